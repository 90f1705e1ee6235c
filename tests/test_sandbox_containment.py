"""What runs in the sandbox can take no more than its limits and reaches nothing outside."""

import asyncio
import os
import pathlib
import platform
import shutil
import signal
import socket
import subprocess

import pytest
from sandboxes import DAEMON, FORK_BOMB, MEMORY_BOMB, SMALL, inside, needs_sandbox, python

from engines.sandbox import box as module
from engines.sandbox import seccomp
from engines.sandbox.box import Limits, Result, Sandbox

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = needs_sandbox


def test_a_fork_bomb_gets_no_more_processes_than_its_limit() -> None:
    result = python(FORK_BOMB)
    assert result.ended == "exit" and 3 < int(result.stdout) < SMALL.processes


def test_a_fork_bomb_that_never_stops_is_ended_and_leaves_nobody() -> None:
    async def play(box: Sandbox) -> Result:
        await box.write("bomb", b"bomb() { bomb | bomb & bomb; }; bomb\n")
        bombed = await box.run(["bash", "bomb"], seconds=1.0)
        assert len((await box.run(["sh", "-c", "echo /proc/[0-9]*"])).stdout.split()) == 2
        return bombed

    result = inside(play)
    assert result.seconds < 10.0


def test_two_sandboxes_count_their_processes_apart() -> None:
    async def play() -> list[Result]:
        async with Sandbox(SMALL) as one, Sandbox(SMALL) as other:
            return list(await asyncio.gather(*(box.run(["python3", "-c", FORK_BOMB]) for box in (one, other))))

    assert all(int(result.stdout) > SMALL.processes // 2 for result in asyncio.run(play()))


def test_one_process_gets_no_more_memory_than_the_limit() -> None:
    result = python("x = bytearray(400 << 20)")
    assert b"MemoryError" in result.stderr and result.ended == "exit"


@pytest.mark.parametrize(
    "source",
    [
        MEMORY_BOMB,
        """
import mmap, os, time
for _ in range(6):
    if not os.fork():
        hoard = mmap.mmap(-1, 60 << 20)
        for at in range(0, 60 << 20, 4096): hoard[at] = 1
        time.sleep(100)
time.sleep(100)
""",
    ],
    ids=["private", "shared"],
)
def test_many_processes_get_no_more_memory_together(source: str) -> None:
    result = python(source)
    assert result.ended == "memory" and result.exit == -signal.SIGKILL


def test_an_endless_loop_is_ended_in_time_whatever_it_ignores() -> None:
    result = python(
        "import signal\nfor n in (1, 2, 3, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: pass", seconds=0.5
    )
    assert result.ended == "timeout" and result.exit == -signal.SIGKILL and 0.5 <= result.seconds < 10


def test_a_process_has_its_share_of_cpu_time_only() -> None:
    result = python("while True: pass", Limits(cpu_seconds=1, seconds=30.0))
    assert result.ended == "exit" and result.exit in (-signal.SIGXCPU, -signal.SIGKILL)


def test_nothing_of_the_host_can_be_read(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "s3cr3t")
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t")
    secret.chmod(0o644)
    result = python(f"""
import glob, os
for path in ({str(secret)!r}, "/etc/passwd", "/etc/shadow", {str(ROOT / "README.md")!r}, "/proc/1/environ",
             "/proc/1/mem", "/proc/1/root/etc/passwd", "/proc/1/cwd", "/proc/1/fd/0", "/sys/kernel", "/var", "/home",
             "/oldroot", "/dev/sda", "/dev/vda", "/dev/mem", "/dev/kmsg", "/run"):
    try:
        print("READ", path, os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(10))
    except OSError:
        pass
ours = ("/proc/1", f"/proc/{{os.getpid()}}")
print("s3cr3t" in str(os.environ), [path for path in glob.glob("/proc/[0-9]*") if path not in ours])
""")
    assert result.stdout == b"False []\n", result.stdout


def test_what_is_named_can_be_read_and_not_written(tmp_path: pathlib.Path) -> None:
    (tmp_path / "data").write_text("for all")
    tmp_path.chmod(0o777)
    readable = pathlib.Path("/opt/stream_rl_test")  # a place whose parents anyone may enter

    async def play() -> Result:
        async with Sandbox(SMALL, readable=[str(readable)]) as box:
            return await box.run(
                ["sh", "-c", f"cat {readable}/data; echo no > {readable}/data; echo no > {readable}/new"]
            )

    shutil.copytree(tmp_path, readable)
    try:
        result = asyncio.run(play())
        assert (readable / "data").read_text() == "for all" and not (readable / "new").exists()
    finally:
        shutil.rmtree(readable)
    assert result.stdout == b"for all" and result.stderr.count(b"Read-only file system") == 2


def test_nothing_outside_can_be_written(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o777)
    result = python(f"""
import os
for path in ("/mine", "/usr/mine", "/usr/bin/env", "/etc/mine", "/dev/mine", "/proc/sys/kernel/core_pattern",
             "/proc/mine", "/proc/sysrq-trigger", "/inside.py", "/bin/sh",
             {str(tmp_path / "mine")!r}, "/proc/1/oom_score_adj"):
    try:
        open(path, "w").write("x"); print("WROTE", path)
    except OSError:
        pass
    try:
        os.unlink(path); print("DELETED", path)
    except OSError:
        pass
os.makedirs("/tmp/x"); open("/dev/shm/x", "w"); open("/work/x", "w")
""")
    assert (result.exit, result.stdout) == (0, b""), result
    assert not list(tmp_path.iterdir()) and not pathlib.Path("/usr/mine").exists()


def test_no_network_not_even_the_host_s_own() -> None:
    abstract = f"\0stream-rl-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(abstract)
        local.listen()
        for listener in (server, local):
            listener.setblocking(False)
        result = python(f"""
import socket
def tried(what, *address):
    try:
        with socket.socket(what) as s:
            s.settimeout(2); s.connect(*address); print("CONNECTED", address)
    except OSError as error:
        print(type(error).__name__)
tried(socket.AF_INET, ("127.0.0.1", {server.getsockname()[1]}))
tried(socket.AF_INET, ("1.1.1.1", 53))
tried(socket.AF_UNIX, {abstract!r})
tried(socket.AF_VSOCK, (socket.VMADDR_CID_HOST, 1))
tried(socket.AF_PACKET, ("lo", 0))
try:
    print(socket.getaddrinfo("example.org", 80))
except OSError as error:
    print(type(error).__name__)
""")
        words = result.stdout.split()
        refused = [
            b"ConnectionRefusedError",
            b"OSError",
            b"ConnectionRefusedError",
            b"PermissionError",
            b"PermissionError",
        ]
        assert words == [*refused, b"gaierror"], result
        for listener in (server, local):
            with pytest.raises(BlockingIOError):
                listener.accept()


def test_an_output_flood_is_cut_and_blocks_nobody() -> None:
    result = python("import os\nwhile True: os.write(1, b'x' * 65536); os.write(2, b'y' * 65536)", seconds=1.0)
    assert (result.stdout, result.stderr) == (b"x" * SMALL.output_bytes, b"y" * SMALL.output_bytes)
    assert result.ended == "timeout" and result.dropped_bytes > SMALL.output_bytes


@pytest.mark.parametrize("directory", ["/work", "/tmp", "/dev/shm"])
def test_a_disk_flood_ends_at_the_size_of_the_disk(directory: str) -> None:
    result = python(f"""
import os
wrote = 0
try:
    for i in range(100):
        with open(f"{directory}/{{i}}", "wb", 0) as file:
            while True:
                wrote += file.write(bytes(65536))
                if wrote % (2 << 20) == 0: break
except OSError as error:
    print(error.errno, wrote)
""")
    number, wrote = map(int, result.stdout.split())
    assert number == 28 and SMALL.disk_bytes - 65536 <= wrote <= SMALL.disk_bytes


def test_a_flood_of_empty_files_is_ended() -> None:
    result = python("i = 0\nwhile True: open(f'/tmp/{i}', 'w').close(); i += 1")
    assert result.ended == "files"


def test_who_was_left_behind_ends_with_the_program() -> None:
    async def play(box: Sandbox) -> None:
        await box.run(["python3", "-c", DAEMON])
        await box.run(["rm", "/work/beat"])  # there was a heart, and it beats no more
        assert (await box.run(["sh", "-c", "sleep 0.2; ls /work"])).stdout == b""

    inside(play)


def test_no_program_can_end_or_stop_the_sandbox() -> None:
    result = python("import os\nfor n in range(1, 65): \n  try: os.kill(1, n)\n  except OSError: pass\nprint('on')")
    assert result.stdout == b"on\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers here are of x86-64")
def test_system_calls_that_reach_out_or_hide_memory_are_refused() -> None:
    refused = {
        272: 0x10000000,
        165: 0,
        319: 0,
        29: 0,
        68: 0,
        240: 0,
        101: 0,
        250: 0,
        321: 0,
        298: 0,
        323: 0,
        425: 8,
        435: 0,
    }
    cloned = "print(libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0), ctypes.get_errno())"
    result = python(f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for number, argument in {refused!r}.items():
    print(libc.syscall(number, argument, 0, 0, 0, 0), ctypes.get_errno())
{cloned}
print(libc.syscall(39 | 0x40000000), ctypes.get_errno())
print(libc.syscall(39) > 0)
""")
    lines = result.stdout.decode().splitlines()
    assert lines[:12] == ["-1 1"] * 12 and lines[12:] == ["-1 38", "-1 1", "-1 38", "True"], result


def test_the_filter_s_jumps_stay_within_it() -> None:
    for machine in seccomp.MACHINES:
        steps = seccomp.program(machine)
        assert len(steps) % 8 == 0
        count = len(steps) // 8
        for at in range(count):
            code, if_true, if_false = (
                int.from_bytes(steps[8 * at : 8 * at + 2], "little"),
                *steps[8 * at + 2 : 8 * at + 4],
            )
            assert code == 0x06 or at + 1 + max(if_true, if_false) < count


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv") or not os.access("/usr/bin/python3.11", os.X_OK),
    reason="needs root, to become somebody else, with a Python that anyone may start",
)
def test_an_ordinary_user_s_sandbox_contains_the_same() -> None:
    """Its process 1 is of the same user as the programs, in a user namespace: another way to the same end."""
    site = pathlib.Path(pytest.__file__).parents[1]
    bubblewrap = pathlib.Path(module.find_bubblewrap() or "")
    environment = {"PATH": f"{bubblewrap.parent}:/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{site}"}
    user = ["setpriv", "--reuid", "61234", "--regid", "61234", "--clear-groups", "/usr/bin/python3.11", "-B"]
    done = subprocess.run(
        [*user, str(ROOT / "tests" / "sandboxes.py")], capture_output=True, env=environment, cwd="/", check=False
    )
    assert done.stdout == b"contained\n", done.stderr.decode()
