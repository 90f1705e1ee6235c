"""A learner of several processes that is used as one; see megatron_led.py."""

import json
import pathlib
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from huggingface_reference import write_random_model
from hypothesis import given
from hypothesis import strategies as st
from megatron_builders import LENGTHS, PPO, TEMPERATURE, make_batch, make_learner
from megatron_parallel import ROOT, free_port, spawn

from engines.megatron.commands import Command, Names
from engines.weights.fingerprint import model_sum
from stream_rl.types import TrainingBatch, Version


def together(mode: str, directory: pathlib.Path, waited_for: Sequence[int] = (0, 1)) -> list[tuple[int, str]]:
    """Status and errors of those of two processes that are waited for; the others are killed."""
    write_random_model(directory / "model")
    words, port = [str(ROOT / "tests" / "megatron_led.py"), mode, str(directory / "model"), str(directory)], free_port()
    processes = [spawn(words, rank, 2, port) for rank in range(2)]
    try:
        errors = {rank: processes[rank].communicate(timeout=120)[1] for rank in waited_for}
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(processes[rank].returncode, error) for rank, error in errors.items()]


def test_it_is_used_as_one_process_would_be(tmp_path: pathlib.Path) -> None:
    for status, errors in together("whole", tmp_path):
        assert status == 0, errors
    seen = json.loads((tmp_path / "seen.json").read_text())
    alone = make_learner(tmp_path / "model", 60)
    losses = [alone.train_step(make_batch(step), PPO)["loss"] for step in range(2)]
    weights = dict(alone.named_weights())
    assert seen["losses"][:2] == pytest.approx(losses, abs=1e-6)
    assert seen["shape"] == alone.shape.layers
    assert seen["changes"], "the changes of both processes are what changed"
    assert seen["pieces"] == sum(tensor.numel() for tensor in weights.values())
    refused = seen["refused"]
    assert len(refused) == 4
    assert "temperature must be positive" in refused[0]
    assert "cannot be given" in refused[3], "what the others do not know is not sent"
    tokens = [np.arange(n, dtype=np.int32) for n in (5, 1, 40)]
    for got, wanted in zip(seen["logprobs"], alone.logprobs(tokens, TEMPERATURE), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    for directory in ("saved", "checkpoint"):
        saved = make_learner(tmp_path / directory)
        assert model_sum(saved.named_weights()) == seen["sum"] == seen["sum_again"]
        for name, tensor in saved.named_weights():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=2e-5)
    assert seen["version"] == [1, 2]


def test_one_that_follows_a_lost_process_ends_with_its_name(tmp_path: pathlib.Path) -> None:
    (leader, _), (follower, errors) = together("leader dies", tmp_path)
    assert leader == 9
    assert follower not in (0, 9)
    assert re.search(r"EngineError: rank 1 of 2 of the learner (heard nothing from rank 0|failed in policy)", errors), (
        errors
    )


@pytest.mark.long
@pytest.mark.parametrize("mode", ["follower dies", "follower hangs"])
def test_one_that_leads_a_lost_process_is_told_so_and_cannot_go_on(tmp_path: pathlib.Path, mode: str) -> None:
    ((leader, errors),) = together(mode, tmp_path, waited_for=[0])
    assert leader == 0, errors
    first, again = json.loads((tmp_path / "seen.json").read_text())["error"].split("\n", 1)
    assert "rank 0 of 2 of the learner failed in policy.train_step" in first
    assert "no longer together" in again


NAMES = Names({"policy": object()}, {"ppo": PPO})
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.lists(plain), st.dictionaries(st.text(), plain))
def test_a_command_arrives_as_it_was(arguments: list[object], options: dict[str, object]) -> None:
    command = Command(target="policy", method="train_step", arguments=arguments, options=options)
    assert NAMES.decode(NAMES.encode(command)) == command


def test_what_a_learner_is_given_arrives() -> None:
    batch = make_batch(0)
    arguments = [
        batch,
        PPO,
        Version(1, 2),
        pathlib.Path("x/y"),
        NAMES.models["policy"],
        [np.zeros((0, 2)), np.int32(3)],
    ]
    with pytest.raises(TypeError, match="cannot be given"):
        NAMES.encode(Command(target="policy", method="m", arguments=arguments))
    got = NAMES.decode(NAMES.encode(Command(target="policy", method="m", arguments=arguments[:-1]))).arguments
    assert got[1:] == arguments[1:-1]
    assert isinstance(got[0], TrainingBatch) and got[0].temperature == batch.temperature
    for name in ("token_ids", "lengths", "advantages", "loss_weights"):
        np.testing.assert_array_equal(getattr(got[0], name), getattr(batch, name))
        assert getattr(got[0], name).dtype == getattr(batch, name).dtype
    assert got[0].reference_logprobs is None
    assert got[0].lengths.tolist() == LENGTHS
