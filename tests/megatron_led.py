"""A learner of several processes that is used as one: `megatron_led.py MODE MODEL OUT`, in each as torchrun would.

The first process leads and says what it saw in OUT/seen.json; MODE is what goes wrong.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any

import numpy as np
import torch
from huggingface_reference import OPTIMIZER
from megatron_builders import PPO, TEMPERATURE, make_batch

from engines.megatron.learner import MegatronLearner
from engines.megatron.ranks import Ranks
from engines.weights.fingerprint import model_sum
from engines.weights.parts import apply_
from stream_rl.config import Learner
from stream_rl.errors import EngineError, WeightsError
from stream_rl.types import Version

TIMEOUT_S = 8.0


def main(mode: str, model: str, out: pathlib.Path) -> None:
    torch.set_num_threads(1)
    section = Learner(micro_batch_tokens=60, optimizer=OPTIMIZER, processes=2, process_timeout_s=60.0)
    learner = MegatronLearner(model, section, seed=0)
    ranks = Ranks({"policy": learner}, {"ppo": PPO}, TIMEOUT_S)
    if ranks.rank:
        if mode == "follower dies":
            learner.train_step = lambda *_: os._exit(7)  # type: ignore[method-assign,assignment]
        if mode == "follower hangs":
            learner.train_step = lambda *_: time.sleep(600)  # type: ignore[method-assign,assignment,return-value]
        ranks.follow()
        return
    with ranks.leading():
        led = ranks.led("policy", MegatronLearner)
        seen = whole(led, out) if mode == "whole" else {"error": fails(mode, led)}
    (out / "seen.json").write_text(json.dumps(seen))


def fails(mode: str, learner: MegatronLearner) -> str:
    if mode == "leader dies":
        learner.train_step(make_batch(0), PPO)
        os._exit(9)
    try:
        learner.train_step(make_batch(0), PPO)
    except EngineError as error:
        try:
            learner.train_step(make_batch(0), PPO)
        except EngineError as again:
            return f"{error}".replace("\n", " ") + f"\n{again}"
    raise AssertionError("the step was taken")


def whole(learner: MegatronLearner, out: pathlib.Path) -> dict[str, Any]:
    seen: dict[str, Any] = {"shape": learner.shape.layers}
    learner.watch_changes()
    bits = {name: tensor.clone().reshape(-1).view(torch.int32) for name, tensor in learner.named_weights()}
    seen["losses"] = []
    for step in range(2):
        seen["losses"].append(learner.train_step(make_batch(step), PPO)["loss"])
        for piece in learner.take_changes().pieces():
            apply_(bits[piece.name][piece.start : piece.stop], piece.change)
    seen["refused"] = refusals(learner, out)
    time.sleep(1.2 * TIMEOUT_S)  # an idle leader is not taken for a dead one

    next(iter(learner.named_weights()))  # and no more: the others must not wait for the rest
    weights = dict(learner.named_weights())
    seen["changes"] = all(torch.equal(bits[name], weights[name].reshape(-1).view(torch.int32)) for name in bits)
    seen["pieces"] = sum(piece.change.elements for piece in learner.all_pieces())
    seen["sum"] = model_sum(learner.named_weights())
    tokens = [np.arange(n, dtype=np.int32) for n in (5, 1, 40)]
    seen["logprobs"] = [values.tolist() for values in learner.logprobs(tokens, TEMPERATURE)]
    learner.save(out / "saved")
    saving = learner.begin_checkpoint(out / "checkpoint", Version(1, 2), "run")
    seen["losses"].append(learner.train_step(make_batch(2), PPO)["loss"])
    saving.finish()
    seen["version"] = list(learner.load_checkpoint(out / "checkpoint"))
    seen["sum_again"] = model_sum(learner.named_weights())
    return seen


def refusals(learner: MegatronLearner, out: pathlib.Path) -> list[str]:
    """Errors after which both go on."""
    batch, found = make_batch(0), []
    for bad in (
        lambda: learner.train_step(dataclasses.replace(batch, temperature=0.0), PPO),
        lambda: learner.load_checkpoint(out / "nothing"),
        lambda: learner.reset_optimizer({}, {}),
        lambda: learner.train_step(batch, lambda *_: None),  # type: ignore[arg-type,return-value]
    ):
        try:
            bad()
        except (ValueError, WeightsError, TypeError) as error:
            found.append(str(error))
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))
