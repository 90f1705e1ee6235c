"""A supervised warm start: the learner's own steps, on the task's demonstrations.

    python -m actors.warm_start RECIPE --run-id R --output DIRECTORY

Prints one JSON line a report: {"step", "steps", "loss", "tokens_per_second"}.
"""

import itertools
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from algorithms.denominators import TokenKinds, loss_weights
from algorithms.losses import cross_entropy
from engines.megatron.learner import MegatronLearner
from stream_rl import config, runtime
from stream_rl.errors import ConfigError, StreamRLError, TaskError
from stream_rl.task import load_task
from stream_rl.types import Float32Array, Int32Array, TrainingBatch

REPORT_SECONDS = 2.0


def demonstrations(recipe: config.Recipe) -> Iterator[Sequence[str]]:
    """The task's demonstrations, each what is told and what is said in turn: a prompt and its completion, or a prompt,
    a turn, an observation, a turn and so on.  Raises ConfigError if the task has none."""
    task: Any = load_task(recipe.task.use, recipe.task.options)
    if not callable(getattr(task, "demonstrations", None)):
        raise ConfigError(
            f"warm_start.steps is {recipe.warm_start.steps}, but {recipe.task.use} has no demonstrations()"
        )
    shown: Iterator[Sequence[str]] = task.demonstrations(recipe.run.seed)
    return shown


def batch(shown: Sequence[Sequence[str]], tokenizer: Tokenizer, end: int) -> TrainingBatch:
    """Teacher-forced turns, each with the stop token at its end, averaged over their tokens; what is told is read and
    not learned.

    Raises TaskError for a demonstration that does not begin with a prompt or end with a turn.
    """
    ids: list[int] = []
    lengths, trained = [], []
    for texts in shown:
        if isinstance(texts, str) or len(texts) % 2 or not texts or not texts[0]:
            raise TaskError(
                "demonstrations() must yield (prompt, completion) or (prompt, turn, observation, turn, ...), the "
                f"prompt not empty, got {texts!r:.200}"
            )
        before = len(ids)
        for i, text in enumerate(texts):
            said = i % 2 == 1
            new = tokenizer.encode(text).ids + [end] * said
            ids += new
            trained += [said] * len(new)
        lengths.append(len(ids) - before)
    mask = np.array(trained)
    kinds = TokenKinds(lengths=np.array(lengths, np.int32), sampled=mask, trainable=mask)
    zeros: Float32Array = np.zeros(len(ids), np.float32)
    tokens: Int32Array = np.array(ids, np.int32)
    return TrainingBatch(
        token_ids=tokens,
        lengths=kinds.lengths,
        behavior_logprobs=zeros,
        advantages=zeros,
        loss_weights=loss_weights("token_mean", kinds),
        temperature=1.0,
    )


def run(recipe: config.Recipe, output: pathlib.Path) -> None:
    """Train and save.  The optimizer's options are those of [warm_start]."""
    warm = recipe.warm_start
    engine = MegatronLearner(recipe.model.path, recipe.learner, recipe.run.seed)
    engine.reset_optimizer(warm.optimizer, warm.schedule, "warm_start")
    tokenizer = Tokenizer.from_file(f"{recipe.model.path}/tokenizer.json")
    shown = demonstrations(recipe)
    tokens, started, reported = 0, time.perf_counter(), 0.0
    for step in range(1, warm.steps + 1):
        made = batch(list(itertools.islice(shown, warm.sequences)), tokenizer, engine.shape.eos_token_ids[0])
        metrics = engine.train_step(made, cross_entropy)
        tokens += len(made.token_ids)
        now = time.perf_counter()
        if engine.world.peers.rank == 0 and (step == warm.steps or now - reported > REPORT_SECONDS):
            reported = now
            rate = tokens / (now - started)
            line = {"step": step, "steps": warm.steps, "loss": metrics["loss"], "tokens_per_second": rate}
            print(json.dumps(line), flush=True)
    engine.save(output)


if __name__ == "__main__":
    parser = runtime.arguments(__doc__)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    runtime.die_with_parent()
    try:
        run(config.load(options.recipe), options.output)
    except StreamRLError as error:
        sys.exit(f"warm-start: {error}")
