"""`stream-rl bench learner`: tokens a second of a training step, on sequences of long-tailed lengths.

On a CPU the learner takes turns with transformers and torch's AdamW on the same batches, from the same weights: padded,
packed by the learner's own plan, and packed with an attention that does one sequence at a time.  All must have the same
losses and gradient norms, step after step, or they did not do the same work.  On a GPU, and with --alone, the learner
runs by itself, for its utilisation and memory.
"""

import dataclasses
import functools
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

from scripts.bench.publish import interval
from stream_rl import config
from stream_rl.errors import ConfigError
from stream_rl.types import Int32Array, TrainingBatch

if TYPE_CHECKING:
    from engines.megatron.model_shape import ModelShape

TARGETS = {"padded": (1.5, ">="), "packed": (0.9, ">="), "by_sequence": (0.9, ">="), "outside_share": (0.03, "<=")}
UNFUSED_RATE = 25.9e3
"""Tokens a second of 0.6 B on one H200 with unfused attention, 4 x 1024 tokens a step: before this learner."""
GPU_TARGET = 2.2
SAME = 1e-4
"""Losses and gradient norms of two trainers may differ by this share: float32 sums in another order."""
INCLUDES = {
    "over": "seconds of the other's step over those of ours, from batch to new weights: geometric mean and 95 % "
    "interval over steps that both took, in turns whose order rotates.  Ours finds what changed, as in a run, and "
    "computes entropies; the others do neither",
    "cpu_over": "the same of CPU time, which others on the machine disturb less",
    "padded": "sequences side by side in the batch's order, in as many micro-batches as ours, each filled up to its "
    "longest; no mask is needed, so torch's fused causal attention is used",
    "packed": "the learner's micro-batches as one row with position ids, from which transformers makes a "
    "block-diagonal mask for torch's fused attention",
    "by_sequence": "the same row, with a fused causal attention of one sequence at a time put into transformers",
    "outside_share": "CPU time of our step, all threads, that is not the model's forward or backward pass, the "
    "log-softmax of its output, or the optimizer with clipping: planning, packing, loss, metrics, gradient norm, "
    "checks, and finding what changed; over the CPU time of the whole step",
    "model_flops": "see engines/megatron/flops.py; recomputation and padding do not count",
}
OPTIMIZER = {
    "lr": 1e-4,
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-6,  # 1e-8 would turn gradients at rounding level into whole steps
    "clip_grad": 1.0,
}
RL_LR = 1e-6
"""Of the learner by itself: at the rate of the comparison most weights would change in each step, which no run of
reinforcement learning has, and finding them would be most of what is outside the model."""
WARM_UP = 2
"""Steps that do not count: the first ones allocate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    model: pathlib.Path | None
    size: str
    """Of a random model: small, or 0.6b (bfloat16)."""
    tokens: int
    """Of a step.  The median sequence has a 64th of them, the longest at most a quarter."""
    micro_batch_tokens: int
    pairs: int
    """Steps that count."""
    threads: int
    alone: bool
    without: tuple[str, ...]
    """attention, logprobs: which fused kernels not to use on a GPU."""
    profile: pathlib.Path | None
    """Where to write what one more step takes longest over; only with `alone` or on a GPU."""
    options: dict[str, Any]
    """megatron-core's TransformerConfig, under its own names."""


def measure(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """All of it as one object.  Raises ConfigError for a plan that cannot be carried out."""
    if plan.pairs < 3 or plan.tokens < 256:
        raise ConfigError(f"expected 3 pairs or more and 256 tokens or more, got {plan.pairs} and {plan.tokens}")
    # sandboxes let the CPU claim AMX and then stop the process at its first tile, in any bfloat16 product
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    from engines.megatron import attention, core, logprobs, specimen

    if plan.without and core.ON_CPU:
        raise ConfigError(f"--without {' and '.join(plan.without)} is for a GPU; this machine has none")
    attention.FLASH, logprobs.FUSED = "attention" not in plan.without, "logprobs" not in plan.without
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as made:
        directory = plan.model or pathlib.Path(made)
        if plan.model is None:
            say(f"writing a random model ({plan.size})")
            write_model(directory, plan.size)
        found = _alone(plan, directory, say) if plan.alone or not core.ON_CPU else _beside(plan, directory, say)
    return {
        "bench": "learner",
        "device": specimen.device_name(),
        "threads": plan.threads,
        "load_average_before": load,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "options": plan.options,
        "without": plan.without,
        **found,
        "includes": INCLUDES,
    }


def write_model(directory: pathlib.Path, size: str) -> None:
    """A random model: small, or 0.6b (bfloat16)."""
    from engines.megatron import specimen

    small = dataclasses.replace(specimen.sized(256, 4, 4096), dtype="float32")
    specimen.write(directory, small if size == "small" else specimen.QWEN3)


def _section(plan: Plan) -> config.Learner:
    return config.Learner(
        micro_batch_tokens=plan.micro_batch_tokens, threads=plan.threads, model=plan.options, optimizer=OPTIMIZER
    )


def _beside(plan: Plan, directory: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The learner and the three others, in turns."""
    from algorithms.losses import make_loss
    from engines.megatron.learner import MegatronLearner
    from engines.megatron.plan import costs_of
    from engines.megatron.plan import plan as planned
    from engines.megatron.step_costs import MODEL, StepSplit
    from engines.transformers.trainer import LYING, TransformersTrainer

    learner = MegatronLearner(directory, _section(plan), seed=0)
    split = StepSplit(learner)
    others = {lying: TransformersTrainer(directory, lying, OPTIMIZER) for lying in LYING}
    loss = make_loss("ppo_clip", config.Algorithm())
    seconds, cpu_seconds = ({name: list[float]() for name in ("ours", *others)} for _ in range(2))
    shares: dict[str, list[float]] = {}
    padding, farthest = [], 0.0
    for number in range(WARM_UP + plan.pairs):
        batch = long_tailed_batch(plan.tokens, learner.shape.vocab_size, number)
        costs = costs_of(learner.shape, batch.lengths)
        [cuts] = planned(batch.lengths, costs, plan.micro_batch_tokens, 1)
        equal = np.array_split(np.arange(len(batch.lengths)), len(cuts))
        padding.append(_padding(batch.lengths, equal))

        def ours(batch: TrainingBatch = batch) -> dict[str, float]:
            report, cpu = split.train_step(batch, loss)
            if number >= WARM_UP:  # noqa: B023  called before the next round
                whole = sum(cpu.values())
                for part, value in cpu.items():
                    shares.setdefault(part, []).append(value / whole)
            return report

        turns: dict[str, Callable[[], dict[str, float]]] = {"ours": ours}
        for lying, trainer in others.items():
            own = equal if lying == "padded" else cuts
            turns[lying] = functools.partial(trainer.train_step, batch, own, loss)
        order = list(turns)
        order = order[number % len(order) :] + order[: number % len(order)]
        reports, took, cpu_took = {}, {}, {}
        for name in order:
            started, cpu_started = time.perf_counter(), time.process_time()
            reports[name] = turns[name]()
            took[name], cpu_took[name] = time.perf_counter() - started, time.process_time() - cpu_started
        farthest = max(farthest, *(apart(reports["ours"], reports[name]) for name in others))
        say(f"step {number + 1}: " + ", ".join(f"{name} {took[name]:.3f} s" for name in turns))
        if number >= WARM_UP:
            for name in turns:
                seconds[name].append(took[name])
                cpu_seconds[name].append(cpu_took[name])
    over, cpu_over = ({name: _over(times[name], times["ours"]) for name in others} for times in (seconds, cpu_seconds))
    mean_shares = {part: statistics.fmean(values) for part, values in shares.items()}
    outside = sum(share for part, share in mean_shares.items() if part not in MODEL)
    measured = {name: found["mean"] for name, found in over.items()} | {"outside_share": outside}
    return {
        "parameters": _parameters(learner.shape),
        "dtype": learner.shape.dtype,
        "tokens": plan.tokens,
        "sequences": len(batch.lengths),
        "micro_batches": len(cuts),
        "padding_share_of_padded": statistics.fmean(padding),
        "tokens_per_second": {name: plan.tokens / statistics.median(values) for name, values in seconds.items()},
        "over": over,
        "cpu_over": cpu_over,
        "cpu_shares": mean_shares,
        "outside_share": outside,
        "losses_and_norms_apart": farthest,
        "met": {name: _met(measured[name], *TARGETS[name]) for name in TARGETS} | {"same_work": farthest <= SAME},
        "targets": {name: f"{sign} {value}" for name, (value, sign) in TARGETS.items()},
    }


def _alone(plan: Plan, directory: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The learner by itself: rate, utilisation, memory."""
    from algorithms.losses import make_loss
    from engines.megatron import flops
    from engines.megatron.learner import MegatronLearner
    from engines.megatron.step_costs import peak_memory_bytes, profiled

    started = time.perf_counter()
    section = dataclasses.replace(_section(plan), optimizer=OPTIMIZER | {"lr": RL_LR})
    learner = MegatronLearner(directory, section, seed=0)
    learner.watch_changes()
    say(f"the learner was up after {time.perf_counter() - started:.0f} s")
    loss = make_loss("ppo_clip", config.Algorithm())
    seconds, work, reports = [], [], []
    for number in range(WARM_UP + plan.pairs):
        batch = long_tailed_batch(plan.tokens, learner.shape.vocab_size, number)
        learner.wait()
        started = time.perf_counter()
        report = learner.train_step(batch, loss)
        changes = learner.take_changes()
        learner.wait()
        took = time.perf_counter() - started
        say(f"step {number + 1}: {took:.3f} s, loss {report['loss']:.4f}, gradient norm {report['gradient_norm']:.4f}")
        if number >= WARM_UP:
            seconds.append(took)
            work.append(flops.model_flops(learner.shape, batch.lengths))
            reports.append(report | {"find_seconds": changes.seconds, "changed_share": changes.share})
    peak = flops.peak_flops(0.0, learner.shape.dtype)
    rate = plan.tokens * len(seconds) / sum(seconds)
    parameters, over = _parameters(learner.shape), rate / UNFUSED_RATE
    wanted = peak > 0.0 and 0.5e9 <= parameters <= 0.7e9
    peak_memory = peak_memory_bytes()
    if plan.profile is not None:
        plan.profile.write_text(profiled(learner, batch, loss))
    return {
        "parameters": parameters,
        "dtype": learner.shape.dtype,
        "tokens": plan.tokens,
        "sequences": len(batch.lengths),
        "longest": int(batch.lengths.max()),
        "steps": len(seconds),
        "tokens_per_second": rate,
        "step_seconds": {"p50": statistics.median(seconds), "max": max(seconds)},
        "of_them": {
            name: statistics.median(report[name] for report in reports)
            for name in ("forward_backward_seconds", "optimizer_seconds", "find_seconds")
        },
        "changed_share": statistics.fmean(report["changed_share"] for report in reports),
        "model_flops_per_step": statistics.fmean(work),
        "model_flops_per_second": sum(work) / sum(seconds),
        "peak_flops": peak,
        "model_flops_utilization": sum(work) / sum(seconds) / peak if peak else None,
        "peak_memory_gib": peak_memory / 2**30,
        "skipped": sum(report["skipped"] for report in reports),
        "over_unfused": over if wanted else None,
        "met": {"over_unfused": over >= GPU_TARGET} if wanted else {},
        "targets": {"over_unfused": f">= {GPU_TARGET} times {UNFUSED_RATE:g} tokens a second"},
    }


def _parameters(shape: "ModelShape") -> int:
    from engines.megatron.model_shape import expected_shapes

    return sum(math.prod(size) for size in expected_shapes(shape).values())


def long_tailed_batch(tokens: int, vocab: int, seed: int) -> TrainingBatch:
    """A step of exactly `tokens` tokens whose lengths are log-normal with sigma 1; a fifth of each is context."""
    chance = np.random.default_rng(seed)
    lengths = long_tailed_lengths(tokens, chance)
    trained = np.concatenate([np.arange(n) >= max(1, n // 5) for n in lengths])
    logprobs = -math.log(vocab) + 0.3 * chance.normal(size=tokens)
    return TrainingBatch(
        token_ids=chance.integers(0, vocab, tokens).astype(np.int32),
        lengths=lengths,
        behavior_logprobs=np.where(trained, logprobs, 0.0).astype(np.float32),
        advantages=np.repeat(chance.normal(size=len(lengths)), lengths).astype(np.float32),
        loss_weights=(trained / trained.sum()).astype(np.float32),
        temperature=1.0,
    )


def long_tailed_lengths(tokens: int, chance: np.random.Generator) -> Int32Array:
    """Lengths that sum to `tokens`: their median is a 64th of it, and none is above a quarter."""
    lengths: list[int] = []
    left = tokens
    while left:
        drawn = round(tokens / 64 * math.exp(chance.normal()))
        length = min(max(drawn, 2), tokens // 4, left)
        if left - length == 1:  # a sequence of one token trains nothing
            length = left if left <= tokens // 4 else length - 1
        lengths.append(length)
        left -= length
    return np.array(lengths, np.int32)


def _padding(lengths: Int32Array, cuts: list[Any]) -> float:
    """Share of a padded batch that is filling."""
    whole = sum(int(lengths[rows].max()) * len(rows) for rows in cuts)
    return 1.0 - int(lengths.sum()) / whole


def _over(theirs: list[float], ours: list[float]) -> dict[str, float]:
    return interval([math.log(b / a) for a, b in zip(ours, theirs, strict=True)])


def apart(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """The larger of the relative differences of loss and gradient norm; infinite where one is not finite."""
    if not all(math.isfinite(report[name]) for report in (ours, theirs) for name in ("loss", "gradient_norm")):
        return math.inf
    # advantages of both signs cancel in a loss: it is compared with what a token's may be
    loss = abs(ours["loss"] - theirs["loss"]) / max(abs(theirs["loss"]), 0.1)
    return max(loss, abs(ours["gradient_norm"] / theirs["gradient_norm"] - 1.0))


def _met(measured: float, target: float, sign: str) -> bool:
    return measured <= target if sign == "<=" else measured >= target


@click.command()
@click.option("--model", type=click.Path(path_type=pathlib.Path, exists=True), help="A Hugging Face directory.")
@click.option("--size", type=click.Choice(["small", "0.6b"]), default="small", help="Of a random model, without it.")
@click.option("--tokens", default=4096, show_default=True, help="Of one step.")
@click.option("--micro-batch-tokens", default=1024, show_default=True)
@click.option("--pairs", default=8, show_default=True, help="Steps that count, of each.")
@click.option("--threads", default=1, show_default=True, help="On a CPU.")
@click.option("--alone", is_flag=True, help="Only the learner, as on a GPU: rate, utilisation, memory.")
@click.option(
    "--profile", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="Write where one more step's time goes."
)
@click.option(
    "--without", multiple=True, type=click.Choice(["attention", "logprobs"]), help="On a GPU, not by fused kernels."
)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of megatron-core's model; VALUE is JSON."
)
@click.option(
    "--json", "path", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="Write the object here too."
)
def learner(path: pathlib.Path | None, settings: tuple[str, ...], **plan: Any) -> None:
    """Tokens a second of a training step, against transformers with AdamW; on a GPU its utilisation."""
    options = {name: json.loads(value) for name, _, value in (setting.partition("=") for setting in settings)}
    text = json.dumps(measure(Plan(options=options, **plan), lambda line: click.echo(line)), indent=2)
    if path is not None:
        path.write_text(text + "\n")
    click.echo(text)
