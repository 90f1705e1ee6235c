"""`stream-rl bench publish`: what finding and encoding the changes adds to a learner's step.

Two learners of one model take the same steps in turns, one watched and one not.  While a watched step runs, what the
one before it changed is sorted and encoded in another thread, as in a run; nothing runs beside the other learner.
"""

import concurrent.futures
import json
import math
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from stream_rl import config
from stream_rl.errors import ConfigError
from stream_rl.types import TrainingBatch, Version

if TYPE_CHECKING:
    from engines.megatron.found import Changes
    from engines.megatron.learner import MegatronLearner

TARGETS = {"step_wall_ratio": (1.03, "<="), "cpu_share": (0.03, "<=")}
INCLUDES = {
    "step_wall_ratio": "seconds of a watched step over those of the same step of the other learner, from its batch "
    "until the device is idle: geometric mean and 95 % interval over pairs that alternate in order",
    "find_seconds": "of them, what is spent comparing; on a GPU once it has done what was given to it before",
    "cpu_share": "CPU time of our code, in the step and in the thread beside it, over that of the whole process "
    "during a watched step; on a GPU waiting for it counts too, because its driver spins",
    "encode_cpu_seconds": "CPU time of sorting one step's changes and encoding them, in the thread beside the steps",
}
WARM_UP = 3
"""Steps, so that Adam's first, which are larger than any later ones, are not among those that count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    model: pathlib.Path | None
    hidden: int
    layers: int
    vocab: int
    tokens: int
    """Of a step."""
    sequence: int
    """Tokens of one sequence."""
    pairs: int
    lr: float


def measure(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """All of it as one object.  Raises ConfigError for a plan that cannot be carried out."""
    if plan.pairs < 3 or plan.tokens < plan.sequence or plan.sequence < 2:
        raise ConfigError("expected 3 pairs or more, and a step of at least one sequence of 2 tokens or more")
    # sandboxes let the CPU claim AMX and then stop the process at its first tile, in any bfloat16 product
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    from engines.megatron import specimen
    from engines.megatron.learner import MegatronLearner
    from engines.weights.codes import payload

    payload.prepare()
    threads = len(os.sched_getaffinity(0)) if plan.model is None else 1
    section = config.Learner(
        micro_batch_tokens=max(8192, plan.sequence), threads=threads, optimizer={"lr": plan.lr, "clip_grad": 1.0}
    )
    with tempfile.TemporaryDirectory() as made:
        directory = plan.model or pathlib.Path(made)
        if plan.model is None:
            say(f"writing a random model of {plan.layers} layers of {plan.hidden}")
            specimen.write(directory, specimen.sized(plan.hidden, plan.layers, plan.vocab))
        watched, plain = (MegatronLearner(directory, section, seed=0) for _ in range(2))
    watched.watch_changes()
    return _compare(plan, watched, plain, say)


def _compare(
    plan: Plan, watched: "MegatronLearner", plain: "MegatronLearner", say: Callable[[str], None]
) -> dict[str, Any]:
    from algorithms.losses import make_loss
    from engines.megatron import specimen

    loss = make_loss("ppo_clip", config.Algorithm())
    batches = (_batch(plan, watched.shape.vocab_size, seed) for seed in range(WARM_UP + plan.pairs))
    logs, with_seconds, plain_seconds, find, encode, own, shares, sizes = ([] for _ in range(8))
    previous: Changes | None = None
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        for number, batch in enumerate(batches):

            def with_changes(batch: TrainingBatch = batch, changes: "Changes | None" = previous) -> Any:
                started, process = time.perf_counter(), time.process_time()
                working = beside.submit(_encode, changes, plan) if changes is not None else None
                watched.train_step(batch, loss)
                taken = watched.take_changes()
                watched.wait()
                seconds = time.perf_counter() - started
                cpu, size = working.result() if working is not None else (0.0, 0)
                return seconds, taken, time.process_time() - process, cpu, size

            def without(batch: TrainingBatch = batch) -> float:
                started = time.perf_counter()
                plain.train_step(batch, loss)
                plain.wait()
                return time.perf_counter() - started

            if number % 2:
                alone = without()
                seconds, previous, process, cpu, size = with_changes()
            else:
                seconds, previous, process, cpu, size = with_changes()
                alone = without()
            assert previous is not None
            if number < WARM_UP:
                continue
            say(f"pair {number - WARM_UP + 1}: {seconds:.4f} s watched, {alone:.4f} s not, encoded in {cpu:.4f} s")
            logs.append(math.log(seconds / alone))
            with_seconds.append(seconds)
            plain_seconds.append(alone)
            find.append(previous.seconds)
            encode.append(cpu)
            own.append((previous.cpu_seconds + cpu) / process)
            shares.append(previous.share)
            sizes.append(size)
    elements = sum(math.prod(tensor.shape) for _, tensor in watched.named_weights())
    ratio = interval(logs)
    found = {"step_wall_ratio": ratio["mean"], "cpu_share": statistics.fmean(own)}
    return {
        "bench": "publish",
        "device": specimen.device_name(),
        "parameters": elements,
        "dtype": watched.shape.dtype,
        "tokens": plan.tokens,
        "lr": plan.lr,
        "changed_share": statistics.fmean(shares),
        "update_bytes": statistics.fmean(sizes),
        "step_seconds": {"watched": statistics.median(with_seconds), "plain": statistics.median(plain_seconds)},
        "find_seconds": statistics.median(find),
        "encode_cpu_seconds": statistics.median(encode),
        "step_wall_ratio": ratio,
        "cpu_share": found["cpu_share"],
        "met": {name: found[name] <= most for name, (most, _) in TARGETS.items()},
        "targets": {name: f"{sign} {most}" for name, (most, sign) in TARGETS.items()},
        "includes": INCLUDES,
    }


def _encode(changes: "Changes", plan: Plan) -> tuple[float, int]:
    """CPU seconds of what the hand-over does with a version, and its bytes."""
    from engines.weights.codes.payload import Code
    from engines.weights.parts import Line, cut

    started = time.thread_time()
    line = Line("bench", Version(0, 0), Version(0, 1), False)
    parts = cut(changes.pieces(), line, Code.FAST, config.Weights().part_bytes)
    return time.thread_time() - started, sum(part.payload.size for part in parts)


def _batch(plan: Plan, vocab: int, seed: int) -> TrainingBatch:
    chance = np.random.default_rng(seed)
    count = plan.tokens // plan.sequence
    tokens = count * plan.sequence
    weights = np.full((count, plan.sequence), 1 / tokens, np.float32)
    weights[:, 0] = 0.0
    return TrainingBatch(
        token_ids=chance.integers(0, vocab, tokens).astype(np.int32),
        lengths=np.full(count, plan.sequence, np.int32),
        behavior_logprobs=np.full(tokens, -math.log(vocab), np.float32),
        advantages=chance.normal(size=tokens).astype(np.float32),
        loss_weights=weights.reshape(-1),
        temperature=1.0,
    )


def interval(logs: list[float]) -> dict[str, float]:
    mean, degrees = statistics.fmean(logs), len(logs) - 1
    z = statistics.NormalDist().inv_cdf(0.975)
    # Student's quantile by its expansion around the normal one: right to 1 % from 4 degrees of freedom
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"mean": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half), "pairs": len(logs)}


@click.command()
@click.option("--model", type=click.Path(path_type=pathlib.Path, exists=True), help="A Hugging Face directory.")
@click.option("--hidden", default=256, show_default=True, help="Of a random model, if there is no --model.")
@click.option("--layers", default=4, show_default=True)
@click.option("--vocab", default=4096, show_default=True)
@click.option("--tokens", default=2048, show_default=True, help="Of one step.")
@click.option("--sequence", default=512, show_default=True, help="Tokens of one sequence.")
@click.option("--pairs", default=16, show_default=True)
@click.option("--lr", default=1e-6, show_default=True)
@click.option(
    "--json", "path", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="Write the object here too."
)
def publish(path: pathlib.Path | None, **plan: Any) -> None:
    """What finding and encoding the changes of a version adds to a learner's step."""
    text = json.dumps(measure(Plan(**plan), lambda line: click.echo(line)), indent=2)
    if path is not None:
        path.write_text(text + "\n")
    click.echo(text)
