"""Fixtures shared by the session: one real server with an untied model serves every test that needs one."""

import os
import pathlib
from collections.abc import Iterator

import marked_model
import pytest
from engine_harness import EngineHarness

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")


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
