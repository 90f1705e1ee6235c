"""`stream-rl learner`: what a run's learner did, done again without the rest of the run."""

import os
import pathlib
import subprocess
import sys

import click

from scripts import runs
from stream_rl import config, runtime
from stream_rl.errors import ConfigError

CAPSULE_LINES = 40
"""Findings that are printed."""
RUN = click.Path(exists=True, file_okay=False, path_type=pathlib.Path)


@click.group()
def learner() -> None:
    """The learner's side of a run."""


@learner.command()
@click.argument("run", type=RUN)
def replay(run: pathlib.Path) -> None:
    """Take the steps of a RUN again, on the leases that it kept, from the weights that it began with.

    Compares the loss of every step and, where there is a checkpoint, all weights: on a CPU they are the same to the
    bit.  Exit status 1 where they are not.
    """
    recipe_path = run / "recipe.toml"
    recipe = config.load(recipe_path)
    leases = _leases(run)
    if recipe.learner.leases == "only_record":
        raise ConfigError(
            f"the run in {run} trained on none of its leases, so there is nothing to compare with; `stream-rl train "
            f"RECIPE --train-only {run}` trains on them"
        )
    sys.exit(_take_steps(recipe, recipe_path, leases, "--compare", str(run)))


@learner.command()
@click.argument("checkpoint", type=RUN)
@click.argument("directory", type=click.Path(path_type=pathlib.Path))
def export(checkpoint: pathlib.Path, directory: pathlib.Path) -> None:
    """Copy the model of a CHECKPOINT, RUN/checkpoints/NAME, to DIRECTORY: weights, configuration and tokenizer as
    Hugging Face has them, without the training state."""
    from engines.megatron import resume

    resume.export(checkpoint, directory)
    click.echo(f"wrote {directory}")


@learner.command()
@click.argument("capsule", type=RUN)
@click.option("--weights", type=RUN, help="A Hugging Face directory, as a checkpoint is.  [default: the RUN's last]")
def capsule(capsule: pathlib.Path, weights: pathlib.Path | None) -> None:
    """Train again on a CAPSULE, RUN/capsules/step-HISTORY-STEP: what of it is not finite, and where."""
    from actors import capsules

    kept, findings = capsules.try_again(capsule, weights or _last_weights(capsule.resolve().parents[1]))
    for one in findings[:CAPSULE_LINES]:
        place = "as a whole" if one.token < 0 else f"token {one.token} (id {one.token_id}), sampled by {one.version}"
        click.echo(f"{one.what}: sequence {one.sequence} (group {one.group}, member {one.member}), {place}")
    if left := findings[CAPSULE_LINES:]:
        click.echo(f"... and {len(left)} more")
    told = f"step {kept.version} of {kept.run}: {len(kept.batch.lengths)} sequences, {len(kept.batch.token_ids)} tokens"
    click.echo(f"{told}; {len(findings) or 'nothing'} not finite with these weights")


def _last_weights(run: pathlib.Path) -> pathlib.Path:
    """The newest checkpoint of a run, or the weights that it began with.  Raises ConfigError if there is no run."""
    found = sorted((run / "checkpoints").glob("*/model*.safetensors"), key=lambda path: path.stat().st_mtime)
    if found:
        return found[-1].parent
    if not (run / "recipe.toml").is_file():
        raise ConfigError(f"{run} is not a run's directory; say which weights to take with --weights")
    return pathlib.Path(config.load(run / "recipe.toml").model.path)


def train_only(recipe: config.Recipe, leases: pathlib.Path) -> None:
    """Train on a directory of leases, in a run directory of its own.  Raises ConfigError, SystemExit."""
    found = _leases(leases)
    if found.resolve().is_relative_to(recipe.run_directory.resolve()):
        raise ConfigError(f"{found} is in {recipe.run_directory}, which is to be emptied; choose another run.name")
    directory = runs.empty(recipe, lambda text: click.echo(text, err=True))
    config.dump(recipe, directory / "recipe.toml")
    if status := _take_steps(recipe, directory / "recipe.toml", found, "--save", str(directory)):
        sys.exit(status)
    click.echo(f"\n  steps       {directory}/learner.jsonl\n  weights     {directory}/checkpoints/final")


def _leases(directory: pathlib.Path) -> pathlib.Path:
    """The leases in a directory of them, or in a run's.  Raises ConfigError saying how a run keeps them."""
    inner = directory / "leases"
    found = inner if inner.is_dir() else directory
    if not any(found.glob("*.lease")):
        raise ConfigError(
            f"there are no leases in {directory}: `stream-rl train RECIPE learner.leases=record` keeps those of a run, "
            "`stream-rl train RECIPE --rollout-only` makes them without training"
        )
    return found


def _take_steps(recipe: config.Recipe, path: pathlib.Path, leases: pathlib.Path, *words: str) -> int:
    """In processes like the learner's, since the bits depend on their number and threads; the exit status."""
    processes = recipe.learner.processes
    environment = os.environ | {"OMP_NUM_THREADS": str(recipe.learner.threads), runtime.PARENT: str(os.getpid())}
    program = ["actors.replay"]
    if processes > 1:
        program = ["engines.megatron.launch", "--processes", str(processes), "--module", "actors.replay"]
    command = [sys.executable, "-m", *program, str(path), "--run-id", "replay", "--leases", str(leases), *words]
    return subprocess.run(command, env=environment, check=False).returncode
