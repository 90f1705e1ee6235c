"""A learner of several processes with a critic and a reference: `beside_ranks.py RECIPE OUTPUT` in each, as torchrun
would; the first leaves what came of a few steps, the others follow it."""

import json
import pathlib
import sys

import numpy as np
import safetensors.torch
import torch
from learner_peers import make_lease

from actors.scoring import score
from actors.together import together
from actors.training import Training, models_beside
from engines.megatron.learner import MegatronLearner
from stream_rl import config
from stream_rl.types import Version

STEPS = 3


def main(path: str, output: str) -> None:
    torch.set_num_threads(1)
    recipe = config.load(path)
    engine = MegatronLearner(recipe.model.path, recipe.learner, recipe.run.seed)
    with together(recipe, engine, models_beside(recipe)) as leading:
        if leading is None:
            return
        policy, beside = leading
        training = Training(recipe, "run-1", policy, beside)
        metrics = [training.step(make_lease(Version(0, step))) for step in range(STEPS)]
        poisoned = make_lease(Version(0, STEPS))
        spoiled = np.where(poisoned.trainable == 1, np.float32(np.nan), poisoned.logprobs)
        metrics.append(training.step(make_lease(Version(0, STEPS), logprobs=spoiled)))
        views, _ = score(make_lease(Version(0, 9)), beside, recipe)
        tensors = {name: tensor.clone() for name, tensor in policy.named_weights()}
        for name in ("reference_logprobs", "values"):
            tensors[name] = torch.from_numpy(getattr(views, name))
        policy.save_checkpoint(pathlib.Path(output) / "checkpoint", Version(0, STEPS), "run-1", **beside.trained)
    safetensors.torch.save_file(tensors, pathlib.Path(output) / "tensors.safetensors")
    (pathlib.Path(output) / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(*sys.argv[1:])
