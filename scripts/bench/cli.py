"""`stream-rl bench`."""

import json
import pathlib

import click

from scripts.bench.codec import codec
from scripts.bench.endpoint import endpoint
from scripts.bench.engine import engine
from scripts.bench.learned import learned
from scripts.bench.learner import learner
from scripts.bench.learner_gap import learner_gap
from scripts.bench.loop import loop
from scripts.bench.publish import publish
from scripts.bench.report import report
from scripts.bench.staleness import staleness
from scripts.bench.updates import updates


@click.group()
def bench() -> None:
    """Measure parts of the system; one JSON object comes last."""


@bench.command()
@click.option("--tokens", default=24_000_000, show_default=True, help="Of all rounds of ingest together.")
@click.option("--requests", default=256, show_default=True, help="Running at once: rows of a chunk message.")
@click.option(
    "--json", "path", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="Write the object here too."
)
@click.option("--fsync/--no-fsync", default=True, show_default=True, help="Of each commit of the journal.")
def queue(tokens: int, requests: int, path: pathlib.Path | None, fsync: bool) -> None:
    """Durable ingest of the trajectory queue: rate, cost, delay, memory, and the same bytes through less."""
    from scripts.bench.queue import Plan, measure

    result = measure(Plan(tokens=tokens, requests=requests, fsync=fsync), lambda line: click.echo(line))
    text = json.dumps(result, indent=2)
    if path is not None:
        path.write_text(text + "\n")
    click.echo(text)


bench.add_command(codec)
bench.add_command(engine)
bench.add_command(endpoint)
bench.add_command(learned)
bench.add_command(learner)
bench.add_command(learner_gap)
bench.add_command(loop)
bench.add_command(publish)
bench.add_command(report)
bench.add_command(staleness)
bench.add_command(updates)
