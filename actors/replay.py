"""The steps of a directory of leases, taken by a learner alone: no queue, no engines.

    python -m actors.replay RECIPE --run-id R --leases DIRECTORY [--compare RUN] [--save RUN]

compare: with the losses and the checkpoints of the run that the leases are of; status 1 at the first difference.
save: write learner.jsonl and checkpoints/final into this run directory.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from actors import leases
from actors.checkpoints import FINAL
from actors.learner import log_line
from actors.scoring import Beside
from actors.together import together
from actors.training import Training, models_beside
from engines.megatron import resume
from engines.megatron.checkpoint import CheckpointTensors
from engines.megatron.learner import MegatronLearner
from engines.weights import fingerprint
from stream_rl import config, runtime
from stream_rl.errors import StreamRLError, WeightsError
from stream_rl.messages import Lease
from stream_rl.metrics import JsonLines, finite, read_lines
from stream_rl.types import Version

COMPARED = ("outcome", "loss", "gradient_norm")
"""Of a step's line in learner.jsonl; all else is the lease's own."""


class Differs(StreamRLError):
    """A step that was taken again came to something else."""


class Recorded:
    """What a run wrote of its steps and weights."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._steps = {(line["history"], line["step"]): line for line in read_lines(directory / "learner.jsonl")}
        self._checkpoints: dict[Version, pathlib.Path] = {}
        for path in sorted(each for each in (directory / "checkpoints").glob("*") if not each.name.startswith(".")):
            try:
                self._checkpoints[resume.read(path).version] = path
            except WeightsError as error:
                print(f"{error}; it is not compared", flush=True)
        self.compared: list[str] = []
        """Checkpoints that held the same weights."""

    def taken(self, paths: Sequence[pathlib.Path]) -> Sequence[pathlib.Path]:
        """Of the leases, those up to the last that the run is known to have trained on."""
        last = max((n for n, path in enumerate(paths) if leases.step_of(path) in self._steps), default=-1)
        return paths[: last + 1]

    def compare(self, lease: Lease, line: dict[str, Any], engine: MegatronLearner) -> bool:
        """Whether there is a line of this step, which a loss of power may have taken.  Raises Differs if the step came
        to something else, or the weights after it did."""
        was = self._steps.get(lease.step)
        for name in COMPARED:
            if was is not None and line[name] != was[name]:
                raise Differs(
                    f"step {lease.step} differs first: its {name} was {was[name]!r}, now it is {line[name]!r}"
                )
        version = Version(lease.step.history, lease.step.step + 1)
        if (path := self._checkpoints.get(version)) is not None:
            with CheckpointTensors(path) as tensors:
                then = fingerprint.text(fingerprint.model_sum(tensors.items()))
            if (now := weights_hash(engine)) != then:
                raise Differs(f"the weights after step {lease.step} differ: {path} holds {then}, now they are {now}")
            self.compared.append(path.name)
        return was is not None


def weights_hash(engine: MegatronLearner) -> str:
    return fingerprint.text(fingerprint.model_sum(engine.named_weights()))


class Alone:
    """A learner with no run around it."""

    def __init__(self, recipe: config.Recipe, run: str, engine: MegatronLearner, beside: Beside) -> None:
        """engine, beside: with the recipe's first weights."""
        self.engine, self._training = engine, Training(recipe, run, engine, beside)

    def steps(self, paths: Iterable[pathlib.Path]) -> Iterator[tuple[Lease, dict[str, Any]]]:
        """Train on each lease; it, and its line for learner.jsonl."""
        for path in paths:
            lease = leases.read(path)
            metrics = self._training.step(lease)
            outcome = "skipped" if metrics["skipped"] else "trained"
            yield lease, finite(log_line(lease, outcome, metrics) | {"metrics": metrics})


@contextlib.contextmanager
def alone(recipe: config.Recipe, run: str) -> Iterator[Alone | None]:
    """A learner with the recipe's first weights; None in those of its processes that follow.  Raises as
    `MegatronLearner`."""
    engine = MegatronLearner(recipe.model.path, recipe.learner, recipe.run.seed)
    with together(recipe, engine, models_beside(recipe)) as models:
        yield Alone(recipe, run, *models) if models else None


def compare(recipe: config.Recipe, run: str, directory: pathlib.Path, of: pathlib.Path) -> None:
    """Raises Differs."""
    paths = leases.surviving(directory)
    recipe = dataclasses.replace(recipe, learner=dataclasses.replace(recipe.learner, capsules=0))
    with alone(recipe, run) as learner:
        if learner is not None:
            _compare(learner, paths, Recorded(of))


def _compare(learner: Alone, paths: Sequence[pathlib.Path], recorded: Recorded) -> None:
    taken, count = recorded.taken(paths), 0
    for lease, line in learner.steps(taken):
        found = recorded.compare(lease, line, learner.engine)
        count += found
        print(f"step {lease.step}  {_told(line)}  {'equal' if found else 'there is no line of it'}", flush=True)
    if len(taken) < len(paths):
        print(f"{len(paths) - len(taken)} more leased and not taken: the run had not come to its end", flush=True)
    weights = f"the weights of {', '.join(recorded.compared)}" if recorded.compared else "no checkpoint to compare with"
    print(f"equal to the bit: the loss and gradient of {count} steps; {weights}", flush=True)


def train(recipe: config.Recipe, run: str, directory: pathlib.Path, to: pathlib.Path) -> None:
    """Train on run.steps of the leases, or on all if they are fewer, and write down how it went."""
    paths = leases.surviving(directory)[: recipe.run.steps]
    with alone(recipe, run) as learner:
        if learner is None:
            return
        lines = JsonLines(to / "learner.jsonl")
        for lease, line in learner.steps(paths):
            lines.write(line)
            print(f"step {lease.step}  {_told(line)}", flush=True)
        lines.close()
        learner.engine.save(to / "checkpoints" / FINAL)
        print(f"weights {weights_hash(learner.engine)}", flush=True)


def _told(line: dict[str, Any]) -> str:
    return f"loss {line['loss']:.6g}" if line["loss"] is not None else "skipped"


def main() -> None:
    parser = runtime.arguments(__doc__)
    for name in ("--leases", "--compare", "--save"):
        parser.add_argument(name, type=pathlib.Path, required=name == "--leases")
    options: argparse.Namespace = parser.parse_args()
    runtime.log_to_stderr("replay")
    runtime.die_with_parent()
    recipe = config.load(options.recipe)
    try:
        if options.compare is not None:
            compare(recipe, options.run_id, options.leases, options.compare)
        if options.save is not None:
            train(recipe, options.run_id, options.leases, options.save)
    except StreamRLError as error:
        sys.exit(f"stream-rl: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
