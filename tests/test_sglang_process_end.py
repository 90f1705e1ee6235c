"""An engine of which any process is killed ends as a whole, soon, and leaves nothing behind."""

import contextlib
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator

import marked_model
import psutil
import pytest
from engine_harness import RUN, EngineHarness

from stream_rl.types import Version, make_rid

pytestmark = [pytest.mark.server, pytest.mark.long]
SOON_SECONDS = 5.0


@contextlib.contextmanager
def engine(directory: pathlib.Path) -> Iterator[tuple[EngineHarness, psutil.Process, list[psutil.Process]]]:
    """A real engine in the middle of requests: its launcher, and what that has started."""
    model = marked_model.write(directory / "model", marked_model.marked_weights(0))
    harness = EngineHarness(directory, model)
    try:
        harness.start()
        harness.publish(Version(0, 0), marked_model.marked_weights(0).items())
        rids = [make_rid(RUN, 0, member, 0) for member in range(4)]
        harness.start_many([harness.generate(rid, [1, 2, 3], 3000) for rid in rids])
        harness.wait(lambda: all(len(harness.streams[rid].token_ids) > 10 for rid in rids), "the first tokens")
        launcher = psutil.Process(harness.processes[-1].pid)
        yield harness, launcher, launcher.children(recursive=True)
    finally:
        harness.stop()


def scheduler(children: list[psutil.Process]) -> psutil.Process:
    [found] = [child for child in children if "scheduler" in " ".join(child.cmdline())]
    return found


def end_of(harness: EngineHarness, children: list[psutil.Process], what: str) -> float:
    """Seconds until the launcher and everything that it had started are gone."""
    start = time.monotonic()
    harness.processes[-1].wait(SOON_SECONDS)
    seconds = time.monotonic() - start
    _, alive = psutil.wait_procs(children, SOON_SECONDS)
    assert not alive, f"after {what} these are left: {[child.cmdline() for child in alive]}"
    print(f"{what}: the launcher ended after {seconds:.2f} s, the last process after {time.monotonic() - start:.2f} s")
    return seconds


Deed = Callable[[EngineHarness, psutil.Process, list[psutil.Process]], None]
DEEDS: dict[str, Deed] = {
    "kill -9 of the scheduler": lambda _, __, children: scheduler(children).kill(),
    "kill -9 of the launcher": lambda _, launcher, __: launcher.kill(),
    "a queue that says fenced": lambda harness, _, __: harness.refuse_engine("fenced"),
    "kill -9 of the detokenizer": lambda _, __, children: next(
        child for child in children if "detokenizer" in " ".join(child.cmdline())
    ).kill(),
}


@pytest.mark.parametrize("what", DEEDS)
def test_the_whole_engine_ends_soon_after(what: str, tmp_path: pathlib.Path) -> None:
    with engine(tmp_path) as (harness, launcher, children):
        assert len(children) >= 2
        group = os.getpgid(launcher.pid)
        assert all(os.getpgid(child.pid) == group for child in children), "the supervisor sweeps one process group"
        DEEDS[what](harness, launcher, children)
        assert end_of(harness, children, what) < SOON_SECONDS
        assert harness.processes[-1].returncode != 0
        if "fenced" in what:
            assert "fenced: played by the harness; this engine ends" in harness.logs()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
