"""The console script `stream-rl`."""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import click

from scripts.bench.cli import bench
from scripts.learner_cli import learner
from scripts.model_cli import model
from scripts.queue_cli import queue
from scripts.simulation.cli import simulate
from scripts.trajectory_cli import trajectory
from scripts.weights_cli import weights
from stream_rl import config
from stream_rl.errors import ConfigError, StreamRLError

HEADLINES = (
    "steps", "reward_first", "reward_last", "heldout_first", "heldout_last", "generated_tokens", "trained_tokens",
    "streamed_before_end", "token_age_mean", "token_age_max", "masked_share", "generation_pauses", "aborted_requests",
    "update_stall_ms_p50", "update_stall_ms_p99", "decode_step_ms_p50", "plugin_cpu_share", "conserved", "wall_s",
)  # fmt: skip
BY_REASON = ("restarts", "resumed", "lost", "dropped", "stock")
"""Parts of the summary that count by name or reason."""


@click.group()
def cli() -> None:
    """Fully asynchronous streaming RL for LLM post-training."""


@cli.command()
@click.argument("recipe", type=click.Path(exists=True, path_type=pathlib.Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--resume", is_flag=True, help="Go on with the run in the recipe's directory, from its last checkpoint.")
@click.option("--hold", is_flag=True, help="Wait for a line on standard input before rollouts begin.")
@click.option("--rollout-only", is_flag=True, help="Keep the leases in the run's directory and train on none of them.")
@click.option(
    "--train-only",
    "leases",
    type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path),
    metavar="LEASES",
    help="Train on the leases in this directory, or in this run's, without engines.",
)
def train(
    recipe: pathlib.Path, overrides: tuple[str, ...], resume: bool, hold: bool, rollout_only: bool,
    leases: pathlib.Path | None,
) -> None:  # fmt: skip
    """Train by a RECIPE (a TOML file, or a run's directory for the recipe there), with any of its keys overridden."""
    if leases is not None and (resume or rollout_only):
        raise click.UsageError("--train-only goes with neither --resume nor --rollout-only")
    loaded = config.load(recipe / "recipe.toml" if recipe.is_dir() else recipe, overrides)
    if recipe.is_dir() and loaded.run_directory.resolve() != recipe.resolve():
        raise ConfigError(
            f"the recipe in {recipe} is of the run directory {loaded.run_directory}, from here: move it there, or give "
            "run.directory and run.name"
        )
    if rollout_only:
        loaded = dataclasses.replace(loaded, learner=dataclasses.replace(loaded.learner, leases="only_record"))
    if leases is not None:
        from scripts.learner_cli import train_only

        train_only(loaded, leases)
        return
    from scripts import runs
    from scripts.train import train as run

    if resume and (summary := runs.summary_of(loaded.run_directory)) is not None:
        click.echo(f"{loaded.run_directory} has come to its end; there is nothing to go on with.")
    else:
        summary = run(loaded, resume, hold)
    _print_summary(loaded, summary)


for command in (queue, learner, simulate, bench, weights, model, trajectory):
    cli.add_command(command)


def _print_summary(recipe: config.Recipe, summary: dict[str, Any]) -> None:
    directory = recipe.run_directory
    click.echo(f"\n{recipe.run.name} is done.")
    for name in HEADLINES:
        value = summary.get(name)
        click.echo(f"  {name:24} {value:.4g}" if isinstance(value, float) else f"  {name:24} {value}")
    same = summary.get("weights_hash_engine") == summary.get("weights_hash_learner")
    click.echo(f"  {'weights':24} engine and learner hold {'the same bits' if same else 'DIFFERENT BITS'}")
    for name in BY_REASON:
        if counts := {reason: n for reason, n in summary.get(name, {}).items() if n}:
            click.echo(f"  {name:24} {json.dumps(counts)}")
    if (size := summary.get("journal_bytes")) is not None:
        click.echo(f"  {'journal':24} {size / 1e6:.1f} MB")
    click.echo(f"\n  all figures   {directory}/summary.json\n  plots         {directory}/report.png")
    click.echo(f"  metrics       {directory}/metrics.jsonl\n  checkpoint    {directory}/checkpoints/final")


def main() -> None:
    """Errors of ours end in one clear line; everything else is a bug and shows its traceback."""
    try:
        cli(standalone_mode=False)
    except StreamRLError as error:
        click.echo(f"stream-rl: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stream-rl: stopped; every process of the run has ended", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
