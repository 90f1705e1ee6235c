"""`stream-rl bench staleness`: reward against the age of what is trained on, for three corrections, on a CPU.

Ages are built, not waited for: each step's answers are sampled by the weights of so many steps ago, with the learner's
own forward pass, so that age is the only difference between two runs.  What trains on them is what a run has: leases
with a version for each token, `actors.training`, the recipe's [algorithm].
"""

import dataclasses
import json
import math
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import numpy as np

from stream_rl import config
from stream_rl.config import Algorithm
from stream_rl.errors import ConfigError
from stream_rl.messages import Lease
from stream_rl.types import Float32Array, Int32Array, Version

ALGORITHMS = {
    "naive PPO": Algorithm(advantage="centered", importance="ratio"),
    "truncated IS": Algorithm(advantage="centered", importance="token", importance_cap=2.0),
    "decoupled PPO": Algorithm(advantage="centered", importance="token", importance_cap=math.inf),
}
INCLUDES = {
    "task": "copy: say a prompt of random symbols again; the reward is the share of places with the right symbol",
    "age": "steps between the weights that sampled an answer and those that its gradient is applied to; the first "
    "steps have no older weights than the first",
    "naive PPO": 'the clip of the ratio to the policy that sampled: importance = "ratio"',
    "truncated IS": 'the policy gradient times min(ratio, 2): importance = "token"',
    "decoupled PPO": "the policy gradient times the ratio: one step a lease, so its clip never acts",
    "age 0": "every ratio is 1 there, to rounding, whatever the correction: run once, for all three",
    "end": "mean reward of the last three evaluations, by the newest weights",
    "whole": "mean reward over all evaluations: how soon it is learned, and whether it stays",
}
EVALUATE_EVERY = 10
SEPARATOR, FIRST_SYMBOL = 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    ages: tuple[int, ...] = (0, 1, 4, 16)
    seeds: int = 3
    steps: int = 200
    lr: float = 1e-3
    """Of 1e-3, 2e-3, 4e-3 and 8e-3 the one that learns fastest at age 0: from 4e-3 on nothing is learned."""
    prompts: int = 16
    """Of a step; each is answered `members` times."""
    members: int = 8
    symbols: int = 8
    answer: int = 4
    """Tokens of the prompt, and of its answer."""
    evaluated: int = 128
    """Prompts of an evaluation."""


DEFAULT = Plan()


def measure(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """All of it as one object.  Raises ConfigError for a plan that cannot be carried out."""
    if not plan.ages or min(plan.ages) < 0 or min(plan.seeds, plan.prompts, plan.answer) < 1 or plan.members < 2:
        raise ConfigError(f"expected ages of 0 and above, a seed, and two members of a prompt or more, got {plan}")
    if plan.steps < 3 * EVALUATE_EVERY or plan.symbols < 2:
        raise ConfigError(f"expected {3 * EVALUATE_EVERY} steps and two symbols or more, got {plan}")
    # sandboxes let the CPU claim AMX and then stop the process at its first tile
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    started, runs = time.perf_counter(), []
    for seed in range(plan.seeds):
        for age in plan.ages:
            for name in ALGORITHMS if age else list(ALGORITHMS)[:1]:
                found = one_run(plan, ALGORITHMS[name], age, seed)
                say(f"seed {seed}, age {age}, {name if age else 'all'}: {found['end']:.2f} at the end")
                runs += [{"algorithm": each} | found for each in ([name] if age else ALGORITHMS)]
    return {
        "bench": "staleness",
        "plan": dataclasses.asdict(plan),
        "summary": summary(runs),
        "runs": runs,
        "seconds": time.perf_counter() - started,
        "includes": INCLUDES,
    }


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds, for each algorithm and age: mean, least and most of `end` and `whole`, and the mean of the rest."""
    found = []
    for name, age in dict.fromkeys((run["algorithm"], run["age"]) for run in runs):
        own = [run for run in runs if (run["algorithm"], run["age"]) == (name, age)]
        line: dict[str, Any] = {"algorithm": name, "age": age}
        for key in ("end", "whole"):
            values = [run[key] for run in own]
            line[key] = {"mean": statistics.fmean(values), "least": min(values), "most": max(values)}
        for key in ("effective_sample_size", "clipped_share", "truncated_share"):
            line[key] = statistics.fmean(run[key] for run in own)
        found.append(line)
    return found


def one_run(plan: Plan, algorithm: Algorithm, age: int, seed: int) -> dict[str, Any]:
    """From a random model to the last step: its evaluations and what its ratios were."""
    from actors.scoring import NOTHING_BESIDE
    from actors.training import Training
    from engines.megatron import specimen
    from engines.megatron.lagged import LaggedSampler
    from engines.megatron.learner import MegatronLearner

    with tempfile.TemporaryDirectory() as made:
        directory = pathlib.Path(made) / "model"
        vocabulary = FIRST_SYMBOL + plan.symbols
        shape = dataclasses.replace(
            specimen.sized(64, 2, vocabulary), dtype="float32", head_dim=32, max_positions=2 * plan.answer + 1
        )
        specimen.write(directory, shape, seed)
        recipe = _recipe(plan, algorithm, directory)
        learner = MegatronLearner(directory, recipe.learner, seed)
        training = Training(recipe, "staleness", learner, NOTHING_BESIDE)
        sampler, chance = LaggedSampler(learner, age, seed), np.random.default_rng(seed)
        rewards, reports = [], []
        for step in range(plan.steps + 1):
            if step % EVALUATE_EVERY == 0:
                answers, _ = sampler.sample(_prompts(plan, plan.evaluated, chance), plan.answer, 1.0, 0)
                rewards.append(float(np.mean([reward(plan, ids) for ids in answers])))
            if step < plan.steps:
                prompts = [each for each in _prompts(plan, plan.prompts, chance) for _ in range(plan.members)]
                answers, logprobs = sampler.sample(prompts, plan.answer, 1.0, age)
                reports.append(training.step(lease_of(plan, step, min(age, step), answers, logprobs)))
                sampler.remember()
    taken = [report for report in reports if not report["skipped"]]
    names = ("effective_sample_size", "clipped_share", "truncated_share", "logprob_gap_abs")
    return {
        "age": age,
        "seed": seed,
        "end": statistics.fmean(rewards[-3:]),
        "whole": statistics.fmean(rewards),
        "rewards": [round(value, 4) for value in rewards],
        "skipped": len(reports) - len(taken),
        **{name: statistics.fmean(report[name] for report in taken) for name in names},
    }


def reward(plan: Plan, ids: Int32Array) -> float:
    return float((ids[-plan.answer :] == ids[: plan.answer]).mean())


def lease_of(plan: Plan, step: int, age: int, answers: list[Int32Array], logprobs: list[Float32Array]) -> Lease:
    """The answers to a step's prompts, member after member, as the queue would lease them."""
    count, length = len(answers), len(answers[0])
    sampled = np.tile(np.arange(length) >= length - plan.answer, count)
    behavior = np.zeros((count, length), np.float32)
    behavior[:, length - plan.answer :] = np.stack(logprobs)
    return Lease(
        step=Version(0, step),
        groups=np.repeat(np.arange(count // plan.members), plan.members),
        members=(members := np.tile(np.arange(plan.members, dtype=np.int32), count // plan.members)),
        episodes=members,
        rewards=np.array([reward(plan, ids) for ids in answers], np.float32),
        max_token_ages=np.full(count, -1, np.int32),
        lengths=np.full(count, length, np.int32),
        token_ids=np.concatenate(answers),
        sampled=sampled.astype(np.uint8),
        trainable=sampled.astype(np.uint8),
        logprobs=behavior.reshape(-1),
        histories=np.zeros(count * length, np.int32),
        steps=np.where(sampled, step - age, 0).astype(np.int32),
        ages=np.where(sampled, age, 0).astype(np.int32),
    )


def _prompts(plan: Plan, count: int, chance: np.random.Generator) -> list[Int32Array]:
    symbols = chance.integers(FIRST_SYMBOL, FIRST_SYMBOL + plan.symbols, (count, plan.answer))
    return [np.append(row, SEPARATOR).astype(np.int32) for row in symbols]


def _recipe(plan: Plan, algorithm: Algorithm, directory: pathlib.Path) -> config.Recipe:
    optimizer = {"lr": plan.lr, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.95, "clip_grad": 1.0}
    return config.Recipe(
        run=config.Run(name="staleness", steps=plan.steps, directory=str(directory.parent)),
        model=config.Model(path=str(directory)),
        task=config.TaskChoice(use="copy"),
        queue=config.Queue(min_tokens=1, max_tokens=1 << 20),
        algorithm=algorithm,
        learner=config.Learner(micro_batch_tokens=8192, optimizer=optimizer),
    )


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Reward against age, at the end and over the whole run: means over seeds, with all of them between the bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plan = result["plan"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    places = {age: place for place, age in enumerate(plan["ages"])}
    for panel, key, title in zip(panels, ("end", "whole"), ("at the end", "mean over the run"), strict=True):
        for shift, name in enumerate(ALGORITHMS):
            lines = [line for line in result["summary"] if line["algorithm"] == name]
            means = [line[key]["mean"] for line in lines]
            below = [line[key]["mean"] - line[key]["least"] for line in lines]
            above = [line[key]["most"] - line[key]["mean"] for line in lines]
            where = [places[line["age"]] + 0.06 * (shift - 1) for line in lines]
            panel.errorbar(where, means, (below, above), marker="o", capsize=3, label=name)
        panel.set(xlabel="age (steps)", title=title, xticks=list(places.values()), xticklabels=list(places))
    panels[0].set(ylabel=f"reward, {plan['steps']} steps, {plan['seeds']} seeds", ylim=(0, 1.02))
    panels[0].legend(loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--steps", default=DEFAULT.steps, show_default=True)
@click.option("--seeds", default=DEFAULT.seeds, show_default=True)
@click.option("--ages", default="0,1,4,16", show_default=True)
@click.option("--lr", default=DEFAULT.lr, show_default=True)
@click.option(
    "--json", "path", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="Write the object here too."
)
@click.option("--plot", "picture", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="Draw it here.")
def staleness(
    steps: int, seeds: int, ages: str, lr: float, path: pathlib.Path | None, picture: pathlib.Path | None
) -> None:
    """Reward against the age of the data, for three corrections."""
    try:
        numbers = tuple(int(age) for age in ages.split(","))
    except ValueError as error:
        raise ConfigError(f"--ages must be numbers with commas between them, got {ages!r}") from error
    result = measure(Plan(steps=steps, seeds=seeds, ages=numbers, lr=lr), lambda line: click.echo(line))
    text = json.dumps(result, indent=2)
    if path is not None:
        path.write_text(text + "\n")
    if picture is not None:
        plot(result, picture)
    click.echo(text)
