# sourced: unpacks the bundles once, makes our plugin known to SGLang, and stops at once if anything cannot be imported
T0=${T0:-$(date +%s)}
say() { echo "[$(( $(date +%s) - T0 )) s] $*"; }
left() { echo $(( ${LIMIT:-580} - ($(date +%s) - T0) )); }  # seconds until this call should be over
export OUT=${OUT:-/tmp/out} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1  # NVLink multicast can put a shared host's GPUs out of service
unset PYTHONDONTWRITEBYTECODE
BUNDLES=${BUNDLES:-.gpu} SITE=${SITE:-/tmp/site}; mkdir -p "$SITE" "$OUT"
for f in "$BUNDLES"/*.tar.xz; do
  mark=$SITE/.$(basename "$f"); [ -e "$mark" ] || { tar xJf "$f" -C "$SITE" && touch "$mark" & }
done; wait
mkdir -p stream_rl.egg-info
printf 'Metadata-Version: 2.1\nName: stream-rl\nVersion: 0.1.0\n' > stream_rl.egg-info/PKG-INFO
printf '[sglang.srt.plugins]\nstream_rl = engines.sglang.plugin:register\n' > stream_rl.egg-info/entry_points.txt
export PYTHONPATH=$SITE:$PWD:$PWD/tests
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader; nproc
python3 - <<'P' || { echo "SETUP FAILED: is every bundle there? see scripts/gpu/README.md"; exit 3; }
import importlib.metadata as m
import aiohttp, click, jinja2, jsonschema, megatron.core, msgspec, numba, numpy, psutil, rich, sglang, tokenizers, tomli_w
import torch, uvloop, zmq
assert torch.cuda.is_available()
print({name: m.version(name) for name in ("torch", "numpy", "numba", "sglang", "megatron-core", "transformers", "pyzmq")})
assert [e.value for e in m.entry_points(group="sglang.srt.plugins") if e.name == "stream_rl"], "plugin not found"
from engines.weights.codes import payload
from engines.weights.codes.kernels import kernels
payload.prepare(); print("kernels:", kernels().__name__)
P
CLI="python3 -m scripts.cli"
TEST="python3 -m pytest -p pytest_timeout -p no:cacheprovider -q -s -x"
say "set up"

show() {  # FILE KEY...: parts of a JSON object by dotted name
  python3 - "$@" <<'P'
import functools, json, pathlib, sys
path = pathlib.Path(sys.argv[1])
told = json.loads(path.read_text()) if path.exists() else {}
for key in sys.argv[2:]:
    print(" ", path.stem, key, json.dumps(functools.reduce(lambda d, k: (d or {}).get(k), key.split("."), told))[:800])
P
}
smollm2() {  # the model, from the parts that earlier calls left in ~/smollm2
  [ -e runs/models/smollm2/config.json ] && return
  cat ~/smollm2/part-* > /tmp/smollm2.gguf
  [ "$(sha256sum < /tmp/smollm2.gguf | cut -c1-64)" = b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 ] ||
    { echo "SMOLLM2 IS NOT WHOLE: $(ls ~/smollm2)"; exit 4; }
  $CLI model import /tmp/smollm2.gguf runs/models/smollm2 || exit 4
  say "model imported"
}
