"""Fixtures shared by the session: one real server with an untied model serves every test that needs one."""

import os
import pathlib
import signal
from collections.abc import Iterator

import marked_model
import pytest
from engine_harness import EngineHarness
from hypothesis import HealthCheck, settings
from run_command import Command, Launch

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# New examples at each run, however slow the machine.  `make test` takes the same each time: its profile is "ci".
settings.register_profile("new", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("new")

# A shell's background jobs ignore both, and so would every process that a test starts and then ends by them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHarness]:
    """Chunked prefill and the overlap scheduler on, and so little KV memory that long requests are retracted."""
    directory: pathlib.Path = tmp_path_factory.mktemp("server")
    model = marked_model.write(directory / "model", marked_model.marked_weights(0))
    server = EngineHarness(directory, model, chunked_prefill_size=64, max_total_tokens=5000)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def launch(tmp_path: pathlib.Path) -> Iterator[Launch]:
    """Starts a run in `tmp_path`; one that a failed test leaves behind is ended."""
    commands: list[Command] = []

    def start(steps: int, *overrides: str) -> Command:
        commands.append(Command(tmp_path, steps, *overrides))
        return commands[-1]

    yield start
    for command in commands:
        command.process.kill()  # its processes end with it
        command.process.wait()
