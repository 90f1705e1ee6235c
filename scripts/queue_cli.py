"""`stream-rl queue`: what the trajectory queue of a run holds and waits for, from the queue itself or, when it does not
run, from its journal."""

import asyncio
import contextlib
import json
import os
import pathlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from scripts import records
from stream_rl import config
from stream_rl.errors import ConfigError, PeerTimeout, WireError
from stream_rl.messages import Done, DrainEngine, Hello, Refused, Status, StatusRequest, Welcome
from stream_rl.metrics import finite, unflatten
from stream_rl.transport import Dealer

M = TypeVar("M")
ANSWER_SECONDS = 2.0
"""A queue that says nothing for this long is taken for one that does not run."""
RATE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run's queue is or was, as its queue.json says."""

    directory: pathlib.Path
    address: str
    run: str
    pid: int

    @property
    def journal(self) -> pathlib.Path:
        return self.directory / "journal.db"

    @property
    def journal_bytes(self) -> int:
        """Of the journal and what the database keeps beside it."""
        return sum(file.stat().st_size for file in self.directory.glob("journal.db*"))


@dataclass(frozen=True, slots=True)
class View:
    """What is known of a queue."""

    place: Place
    running: bool
    age_s: float
    """Since the state was so; 0 while the queue runs."""
    status: dict[str, Any]
    why: list[str]
    rates: dict[str, float] = field(default_factory=dict)
    """Tokens per second over the last second, while the queue runs."""


def find(directory: pathlib.Path | None) -> Place:
    """The queue of the run in `directory`; without one, of the newest run under runs/.  Raises ConfigError."""
    if directory is None:
        found = sorted(pathlib.Path("runs").glob("*/queue.json"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ConfigError(
                f"no run here: looked for runs/*/queue.json in {pathlib.Path.cwd()}; start one with "
                "`stream-rl train RECIPE`, or name the directory of a run"
            )
        directory = found[-1].parent
    path = directory / "queue.json"
    try:
        told = json.loads(path.read_text())
        return Place(directory, str(told["address"]), str(told["run"]), int(told["pid"]))
    except OSError as error:
        raise ConfigError(
            f"no run in {directory}: cannot read {path} ({error.strerror}), which the queue of a run writes at its "
            "start; name the directory of a run, such as runs/quickstart"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not what the queue of a run writes there: {error!r}") from error


def look(place: Place) -> View:
    """Ask the queue; if it does not run or answer, read its journal.  Raises ConfigError if there is neither."""
    if _is_alive(place.pid):
        with contextlib.suppress(PeerTimeout, WireError):
            return asyncio.run(_ask(place))
    return _recover(place)


def drain(place: Place, engine: str) -> None:
    """Have the queue move everything off this engine.  Raises StreamRLError if it does not run or knows no such."""

    async def order() -> None:
        async with _conversation(place) as dealer:
            await dealer.send(DrainEngine(engine=engine))
            await _next(dealer, Done, lambda done: done.what == "DrainEngine")

    try:
        if not _is_alive(place.pid):
            raise PeerTimeout(f"its process {place.pid} has ended")
        asyncio.run(order())
    except PeerTimeout as error:
        raise ConfigError(f"the queue of {place.directory} does not run: {error}") from error


# -- a queue that runs -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _conversation(place: Place) -> AsyncIterator[Dealer]:
    """Registered with the queue.  Raises PeerTimeout if nobody answers, WireError if it is another run's queue."""
    name = f"observer-{os.getpid()}"
    async with Dealer.connect(place.address, f"{name}@1") as dealer:
        hello = Hello(run=place.run, role="observer", name=name, incarnation=1, pid=os.getpid())
        await dealer.send(hello)
        await _next(dealer, Welcome)
        yield dealer


async def _next(dealer: Dealer, kind: type[M], wanted: Callable[[M], bool] = lambda _: True) -> M:
    """The next message of this kind that is wanted; observers are told other things, too.  Raises PeerTimeout."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            while True:
                message = await dealer.receive()
                if isinstance(message, Refused):
                    raise WireError(message.reason, message.detail)
                if isinstance(message, kind) and wanted(message):
                    return message
    except TimeoutError:
        raise PeerTimeout(f"{dealer.address} sent no {kind.__name__} for {ANSWER_SECONDS} s") from None


async def _ask(place: Place) -> View:
    async with _conversation(place) as dealer:
        before, since = await _status(dealer), time.monotonic()
        await asyncio.sleep(RATE_SECONDS)
        now = await _status(dealer)
        seconds = time.monotonic() - since
    names = ("received_tokens", "trained_tokens")
    rates = {name: (now.fields.get(name, 0) - before.fields.get(name, 0)) / seconds for name in names}
    return _view(place, now, running=True, age_s=0.0, rates=rates)


async def _status(dealer: Dealer) -> Status:
    """The answer, and not a status that was on its way: only the answer says why."""
    await dealer.send(StatusRequest(why=True))
    return await _next(dealer, Status, lambda status: "queue.why.0" in status.texts)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# -- a queue that does not run ---------------------------------------------------------------------------------


def _recover(place: Place) -> View:
    from queues.core import Settings  # half a second of imports that a queue that runs makes unnecessary
    from queues.journal import Journal, recover_core

    if not place.journal.is_file():
        raise ConfigError(
            f"the queue of {place.directory} does not run, and there is no {place.journal} to read instead; "
            "start the run again with `stream-rl train RECIPE`"
        )
    recipe = config.load(place.directory / "recipe.toml")
    settings = Settings.of(recipe, place.run)
    files = [file.stat() for file in (place.journal, place.journal.with_name("journal.db-wal")) if file.is_file()]
    written = max(file.st_mtime for file in files if file.st_size)  # whoever reads may leave an empty log behind
    with Journal.inspect(place.journal) as journal:
        status = recover_core(journal, settings).status(why=True)
    return _view(place, status, running=False, age_s=max(0.0, time.time() - written), rates={})


def _view(place: Place, status: Status, *, running: bool, age_s: float, rates: dict[str, float]) -> View:
    tree = unflatten(status.fields, status.texts)
    why = tree.get("queue", {}).pop("why", {})
    return View(place, running, age_s, tree, [why[key] for key in sorted(why, key=int)], rates)


# -- saying it -------------------------------------------------------------------------------------------------


def _headline(view: View) -> str:
    place = view.place
    if view.running:
        return f"{place.directory.name} is running: {place.run}, queue at {place.address}, process {place.pid}"
    return f"{place.directory.name} is not running; this is from its journal, {_seconds(view.age_s)} old"


def _states(status: Mapping[str, Any]) -> Table:
    queue = status.get("queue", {})
    rows = {name: queue.get(name, {}) for name in ("trajectories", "tokens", "groups")}
    states = list(dict.fromkeys(state for row in rows.values() for state in row))
    table = Table("", *(state.replace("_", " ") for state in states), box=None, padding=(0, 2, 0, 0))
    for name, row in rows.items():
        table.add_row(name, *(f"{row[state]:,}" if state in row else "" for state in states))
    return table


def _peers(status: Mapping[str, Any]) -> Table:
    table = Table("", "version", "incarnation", "last heard", box=None, padding=(0, 2, 0, 0))
    for name, peer in status.get("peers", {}).items():
        if peer.get("role") != "observer":
            heard = f"{_seconds(peer['silent_s'])} ago" + (", lost" if peer.get("lost") else "")
            table.add_row(name, peer.get("version", "-"), str(peer["incarnation"]), heard)
    return table


def _figures(view: View) -> dict[str, str]:
    status = view.status
    lines = {"steps": f"{status.get('steps', 0)}, version {status.get('queue', {}).get('version', '-')}"}
    if status.get("trained_tokens"):
        lines["age of trained tokens"] = (
            f"mean {status['token_age_mean']:.2f}, 99 % {status['token_age_p99']}, oldest {status['token_age_max']} "
            f"versions; masked {status['masked_share']:.2%}"
        )
    if by_length := status.get("masked_by_length"):
        lines["masked, short to long"] = " ".join(f"{share:.1%}" for share in by_length.values())
    if view.rates:
        received, trained = (f"{view.rates[f'{name}_tokens']:,.0f} tok/s {name}" for name in ("received", "trained"))
        lines["rates"] = f"{received}, {trained}"
    for name in ("resumed", "dropped"):
        if counts := {reason: n for reason, n in status.get(name, {}).items() if n}:
            lines[name] = ", ".join(f"{n:,} {reason}" for reason, n in counts.items())
    if restarts := _restarts(view.place):
        lines["restarts"] = ", ".join(f"{n} {name}" for name, n in restarts.items())
    lines["journal"] = _journal(view)
    lines["oldest"] = next((line for line in view.why if line.startswith("group ")), "-")
    return lines


def _journal(view: View) -> str:
    queue, size = view.status.get("queue", {}), f"{view.place.journal_bytes / 1e6:.1f} MB"
    if "journal_rows" not in queue:
        return size
    problem = "" if queue.get("journal", "ok") == "ok" else f"; {queue['journal']}"
    return f"{size}, {queue['journal_rows']:,} rows to replay, commits take {queue['commit_ms_p50']:.1f} ms{problem}"


def _restarts(place: Place) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records.read(place.directory)["restart"]:
        counts[record["name"]] = counts.get(record["name"], 0) + 1
    return counts


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def _as_json(view: View, **more: Any) -> None:
    about = {"run": view.place.run, "directory": str(view.place.directory)}
    click.echo(json.dumps(finite(about | {"running": view.running, "age_s": view.age_s} | more)))


run_directory = click.argument("run_directory", required=False, type=click.Path(path_type=pathlib.Path))
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object, for machines.")


@click.group()
def queue() -> None:
    """What a run's trajectory queue holds and waits for (of the newest run, unless its directory is named)."""


@queue.command("status")
@run_directory
@as_json
def show_status(run_directory: pathlib.Path | None, as_json: bool) -> None:
    """States, ages, rates, versions, the journal and the oldest waiting object."""
    view = look(find(run_directory))
    if as_json:
        more = {"restarts": _restarts(view.place), "journal_bytes": view.place.journal_bytes}
        _as_json(view, status=view.status, rates=view.rates, why=view.why[:1], **more)
        return
    figures = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, text in _figures(view).items():
        figures.add_row(name, text)
    console = Console(highlight=False, soft_wrap=True)
    console.print(_headline(view), markup=False)
    for table in (_states(view.status), figures, _peers(view.status)):
        console.print()
        console.print(table)


@queue.command("why")
@run_directory
@as_json
def show_why(run_directory: pathlib.Path | None, as_json: bool) -> None:
    """What everything waits for, by name, one a line."""
    view = look(find(run_directory))
    if as_json:
        _as_json(view, why=view.why)
        return
    if not view.running:
        click.echo(f"{_headline(view)}\n")
    for line in view.why:
        click.echo(line)


@queue.command("drain")
@click.argument("engine")
@run_directory
def drain_engine(engine: str, run_directory: pathlib.Path | None) -> None:
    """Move everything off ENGINE (engine-0) and send nothing to it any more."""
    place = find(run_directory)
    drain(place, engine)
    click.echo(f"{engine} takes no more requests; what it was growing goes on elsewhere")
