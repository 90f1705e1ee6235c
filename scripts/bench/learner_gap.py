"""`stream-rl bench learner-gap`: how far the learner's log-probs are from SGLang's, on the same weights.

SGLang continues random prompts; the learner says how likely it finds each sampled token.  In float32 both are nearly
equal.  In bfloat16 they round in other places, and that is what the off-policy corrections see at age 0.
"""

import asyncio
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from scripts.bench.learner import write_model
from scripts.processes import Child
from stream_rl import config
from stream_rl.errors import ConfigError

START_TIMEOUT_S = 240.0
SAMPLE_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
FLOAT32_TARGET = 1e-4
INCLUDES = {
    "gap": "log-prob of a sampled token, the learner's less SGLang's, both at temperature 1",
    "kl_k3": "mean of exp(gap) - 1 - gap: KL(SGLang || learner), Schulman 2020",
    "effective_sample_size": "mean(exp(gap))^2 / mean(exp(2 gap))",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    model: pathlib.Path | None
    size: str
    prompts: int
    prompt_tokens: int
    new_tokens: int
    micro_batch_tokens: int
    options: dict[str, Any]
    """For SGLang, under its own names."""


def measure(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """All of it as one object.  Raises ConfigError for a plan that cannot be carried out, ProcessDied for SGLang."""
    if min(plan.prompts, plan.prompt_tokens, plan.new_tokens) < 1:
        raise ConfigError("expected 1 or more prompts, prompt tokens and new tokens")
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # see scripts.bench.learner
    from engines.megatron import specimen
    from engines.megatron.learner import MegatronLearner
    from engines.megatron.model_shape import read_model_shape

    with tempfile.TemporaryDirectory() as made:
        directory = plan.model or pathlib.Path(made) / "model"
        if plan.model is None:
            say(f"writing a random model ({plan.size})")
            write_model(directory, plan.size)
        shape = read_model_shape(directory)
        options = _options(plan, shape.dtype) | plan.options
        output = pathlib.Path(made) / "samples.npz"
        started = time.perf_counter()
        asyncio.run(_sample(plan, directory, output, shape.vocab_size, options, say))
        engine_seconds = time.perf_counter() - started
        with np.load(output) as samples:
            token_ids, engine = samples["token_ids"], samples["logprobs"]
        say(f"{engine.size} tokens sampled after {engine_seconds:.0f} s; the learner looks at them")
        section = config.Learner(micro_batch_tokens=plan.micro_batch_tokens, optimizer={"lr": 1e-6})
        learner = MegatronLearner(directory, section, seed=0)
        own = np.stack(learner.logprobs(list(token_ids), 1.0))[:, plan.prompt_tokens :]
    found = gap_statistics(own, engine)
    return {
        "bench": "learner-gap",
        "device": specimen.device_name(),
        "dtype": shape.dtype,
        "sglang": options,
        "tokens": int(engine.size),
        "engine_seconds": engine_seconds,
        "logprob_mean": float(engine.mean()),
        **found,
        "met": {"float32_max_abs": found["abs"]["max"] <= FLOAT32_TARGET} if shape.dtype == "float32" else {},
        "includes": INCLUDES,
    }


def gap_statistics(learner: npt.NDArray[np.float32], engine: npt.NDArray[np.float32]) -> dict[str, Any]:
    """The distribution of the gap.  Raises ValueError for log-probs that are not finite or not of one shape."""
    if learner.shape != engine.shape or not (np.isfinite(learner).all() and np.isfinite(engine).all()):
        raise ValueError(f"expected finite log-probs of one shape, got {learner.shape} and {engine.shape}")
    gap = (learner.astype(np.float64) - engine).reshape(-1)
    size, ratio = np.abs(gap), np.exp(gap)
    quantiles = {f"p{100 * q:g}": float(np.quantile(size, q)) for q in (0.5, 0.9, 0.99, 0.999)}
    return {
        "mean": float(gap.mean()),
        "abs": {"mean": float(size.mean()), **quantiles, "max": float(size.max())},
        "kl_k3": float((np.expm1(gap) - gap).mean()),
        "effective_sample_size": float(ratio.mean() ** 2 / (ratio**2).mean()),
    }


def _options(plan: Plan, dtype: str) -> dict[str, Any]:
    from engines.megatron import core

    room = plan.prompts * (plan.prompt_tokens + plan.new_tokens)
    options = {
        "dtype": dtype,
        "max_running_requests": plan.prompts,
        "max_total_tokens": room + room // 8 + 4096,
    }
    if core.ON_CPU:
        return options | {"device": "cpu", "attention_backend": "torch_native"}
    return options | {
        "device": "cuda",
        "attention_backend": "triton",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "mem_fraction_static": 0.3,
        "disable_cuda_graph": True,
    }


async def _sample(
    plan: Plan,
    model: pathlib.Path,
    output: pathlib.Path,
    vocab: int,
    options: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    log = output.with_suffix(".log")
    words = [str(model), str(output), "--options", json.dumps(options), "--vocab", str(vocab)]
    for name in ("prompts", "prompt_tokens", "new_tokens"):
        words += [f"--{name.replace('_', '-')}", str(getattr(plan, name))]
    started = time.perf_counter()
    child = await Child.start("sglang", "engines.sglang.samples", words, log, threads=1)
    try:
        await child.ready(START_TIMEOUT_S)
        say(f"SGLang was up after {time.perf_counter() - started:.0f} s")
        async with asyncio.timeout(SAMPLE_TIMEOUT_S):
            await child.succeed()
    except TimeoutError:
        raise child.died(f"had not finished after {SAMPLE_TIMEOUT_S:.0f} s") from None
    finally:
        await child.stop(STOP_TIMEOUT_S)


@click.command("learner-gap")
@click.option("--model", type=click.Path(path_type=pathlib.Path, exists=True), help="A Hugging Face directory.")
@click.option("--size", type=click.Choice(["small", "0.6b"]), default="small", help="Of a random model, without it.")
@click.option("--prompts", default=64, show_default=True)
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--new-tokens", default=256, show_default=True, help="Sampled for each prompt.")
@click.option("--micro-batch-tokens", default=8192, show_default=True, help="Of the learner.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of SGLang; VALUE is JSON.")
@click.option(
    "--json", "path", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="Write the object here too."
)
def learner_gap(path: pathlib.Path | None, settings: tuple[str, ...], **plan: Any) -> None:
    """How far the learner's log-probs are from SGLang's on the same weights."""
    options = {name: json.loads(value) for name, _, value in (setting.partition("=") for setting in settings)}
    text = json.dumps(measure(Plan(options=options, **plan), lambda line: click.echo(line)), indent=2)
    if path is not None:
        path.write_text(text + "\n")
    click.echo(text)
