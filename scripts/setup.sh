#!/usr/bin/env bash
# Make a virtual environment with everything in requirements/cpu.txt, and this project in it:
#
#     scripts/setup.sh VENV
#
# PYTHON       the interpreter to start from (default python3.11)
# TORCH_INDEX  an index to take the CPU build of torch from, if pip's own configuration offers none
# TORCH_WHEEL  or a wheel of it: a file or a URL
#
# Running it again repairs what is missing and changes nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
python=${PYTHON:-python3.11}
lock=requirements/cpu.txt
torch=$(grep '^torch==' "$lock")

fail() {
    printf '%s\n' "set-up: $1" "${@:2}" >&2
    exit 1
}

is_python311() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null
}

pip() {
    "$venv/bin/python" -m pip -qq --disable-pip-version-check "$@"
}

if ! is_python311 "$venv/bin/python"; then
    is_python311 "$python" ||
        fail "needs Python 3.11, and '$python' is none; install it, or name it: make PYTHON=/path/to/python3.11"
    "$python" -m venv --clear "$venv" ||
        fail "'$python -m venv $venv' failed; on Debian and Ubuntu the package python3.11-venv is needed"
fi

echo "set-up: 1 of 4, torch for the CPU (about half a minute)"
if [[ -n ${TORCH_WHEEL:-} ]]; then
    from=("$TORCH_WHEEL")
else
    from=(${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$torch")
fi
pip install --no-deps "${from[@]}" ||
    fail "pip found no CPU build of torch ($torch) here; its message is above. Name one, either" \
        "    make TORCH_INDEX=https://download.pytorch.org/whl/cpu    (an index that has it)" \
        "    make TORCH_WHEEL=/path/to/the.whl                        (a wheel of it: file or URL)"

echo "set-up: 2 of 4, $(grep -c == "$lock") pinned packages (about a minute and a half)"
grep -v '^torch==' "$lock" >"$venv/requirements.txt"
pip install --no-deps -r "$venv/requirements.txt"

echo "set-up: 3 of 4, this project"
pip install --no-deps --no-build-isolation --editable .
"$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' ||
    fail "the torch that was installed is no CPU build; name one with TORCH_INDEX or TORCH_WHEEL"
echo "set-up: 4 of 4, bubblewrap, for tasks with a sandbox"
if [[ ! -x $venv/bin/bwrap ]] && ! command -v bwrap >/dev/null; then
    # Debian's package, unpacked: no root is needed
    package=$(mktemp -d)
    trap 'rm -rf "$package"' EXIT
    (cd "$package" && apt-get -qq download bubblewrap && dpkg-deb --extract bubblewrap_*.deb .) &>"$package/log" &&
        install -m 755 "$package/usr/bin/bwrap" "$venv/bin/bwrap" ||
        echo "set-up: there is none: apt-get download bubblewrap did not work ($(tail -n 1 "$package/log"))." \
            "Only tasks with a sandbox need it; to have it, install the package bubblewrap" >&2
fi
echo "set-up: done, in $venv"
