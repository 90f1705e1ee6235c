"""`stream-rl trajectory`: one trajectory of a run, turn by turn."""

import pathlib
from collections.abc import Callable, Sequence

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from scripts import queue_cli, trajectory_page
from scripts.trajectory import Tokens, Trajectory, Turn, find
from stream_rl import config
from stream_rl.errors import ConfigError

EXCERPT = 60
"""Characters of a turn's text in the table."""
WIDTH = 250
"""Of the table where there is no terminal to fit."""
Decode = Callable[[Sequence[int]], str]


@click.group()
def trajectory() -> None:
    """Single trajectories of a run."""


@trajectory.command()
@click.argument("label", metavar="GROUP/MEMBER")
@click.option(
    "--run", "directory", type=click.Path(path_type=pathlib.Path), help="Its directory.  [default: the newest]"
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=pathlib.Path), help="Write one page of it, too.")
@click.option("--full", is_flag=True, help="The whole text of every turn.")
def show(label: str, directory: pathlib.Path | None, html: pathlib.Path | None, full: bool) -> None:
    """Turns, tokens, versions, the gap of log-probs between engine and learner, waits and rewards of one trajectory."""
    place = queue_cli.find(directory)
    found, decode = find(place.directory, place.run, label), decoder(place.directory)
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH
    for line in headline(found):
        console.print(line, markup=False)
    console.print()
    console.print(table(found, decode))
    if full:
        for number, turn in enumerate(found.turns):
            console.print(f"\n--- {number} {turn.kind}", markup=False)
            console.print(decode(found.tokens.ids[turn.start : turn.end].tolist()), markup=False)
    for line in found.missing:
        console.print(f"not known: {line}", markup=False)
    if html is not None:
        rows = [cells(found, turn, decode, excerpt=0) for turn in found.turns]
        try:
            html.write_text(trajectory_page.page(found, headline(found), COLUMNS, rows, decode))
        except OSError as error:
            raise ConfigError(f"cannot write {html}: {error.strerror}") from error
        console.print(f"\nwrote {html}", markup=False)


def decoder(directory: pathlib.Path) -> Decode:
    """Ids to text, by the tokenizer of a run's model; the ids as they are if there is none any more."""
    try:
        path = pathlib.Path(config.load(directory / "recipe.toml").model.path) / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(path)) if path.is_file() else None
    except ConfigError:
        tokenizer = None
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def headline(found: Trajectory) -> list[str]:
    tokens, sampled = found.tokens, int(found.tokens.sampled.sum())
    lines = [
        f"trajectory {found.group}/{found.member}: {found.outcome}" + (f", step {found.step}" if found.step else "")
    ]
    versions = sorted({tokens.version(int(at)) for at in np.flatnonzero(tokens.sampled)})
    spanned = f"{versions[0]} to {versions[-1]}, {len(versions)} in all" if versions else "none"
    turns = sum(turn.kind == "model" for turn in found.turns)
    lines.append(f"{turns} turns of the model; {len(tokens)} tokens, {sampled} of them sampled; versions {spanned}")
    if found.reward is not None:
        parts = ", ".join(f"{name} {value:.4g}" for name, value in found.reward_parts.items())
        lines.append(f"reward {found.reward:.4g}" + (f" ({parts})" if parts else ""))
    if len(found.siblings) > 1:
        others = ", ".join(
            f"{member}: {reward:.4g}" + (f" (of episode {episode})" if episode != member else "")
            for member, episode, reward in found.siblings
        )
        lines.append(f"rewards of its group, by member: {others}")
    if (gaps := tokens.gaps()) is not None and sampled:
        own = gaps[tokens.sampled != 0]
        lines.append(
            f"learner's log-prob less the engine's: mean {own.mean():+.3g}, mean size {np.abs(own).mean():.3g}, "
            f"largest {own[np.abs(own).argmax()]:+.3g}"
        )
    return lines


COLUMNS = ("turn", "tokens", "versions", "age", "log-prob", "gap", "waited", "took", "engines", "text")


def cells(found: Trajectory, turn: Turn, decode: Decode, excerpt: int = EXCERPT) -> tuple[str, ...]:
    """What there is to say of a turn, in the order of COLUMNS.  excerpt: characters of its text; 0: none of it."""
    tokens, here = found.tokens, slice(turn.start, turn.end)
    text = repr(decode(tokens.ids[here].tolist()))[1:-1] if excerpt else ""
    if len(text) > excerpt:
        text = f"{text[: excerpt // 2 - 2]} ... {text[-excerpt // 2 + 3 :]}" if excerpt else ""
    waited, took = times(found, turn)
    if turn.kind != "model":
        return turn.kind, str(turn.end - turn.start), "", "", "", "", _seconds(waited), "", "", text
    first, last = tokens.version(turn.start), tokens.version(turn.end - 1)
    ages, gaps = tokens.ages, tokens.gaps()
    return (
        turn.kind,
        str(turn.end - turn.start),
        str(first) if first == last else f"{first} to {last}",
        _ages(tokens, here) if ages is not None else "",
        f"{tokens.logprobs[here].mean():.3f}",
        "" if gaps is None else f"{np.abs(gaps[here]).mean():.2g}, at most {np.abs(gaps[here]).max():.2g}",
        _seconds(waited),
        _seconds(took),
        ", ".join(turn.engines),
        text,
    )


def times(found: Trajectory, turn: Turn) -> tuple[float | None, float | None]:
    """Seconds that were waited for a turn to begin, and that it took; None where nobody knows.

    The model's wait is from what was said before it to its first chunk: the engine's queue, and its prefill.  An
    observation's is from the model's last chunk to it: the environment.
    """
    at = found.turns.index(turn)
    before = found.turns[at - 1] if at else None
    if turn.kind != "model":
        ended = before.last_s if before is not None else None
        return (None if ended is None or turn.said_s is None else turn.said_s - ended), None
    if turn.first_s is None or turn.last_s is None:
        return None, None
    asked = before.said_s if before is not None else None
    return (None if asked is None else turn.first_s - asked), turn.last_s - turn.first_s


def table(found: Trajectory, decode: Decode) -> Table:
    made = Table(box=None, padding=(0, 2, 0, 0))
    for name in COLUMNS:
        made.add_column(name, justify="right" if name in ("tokens", "age", "log-prob", "waited", "took") else "left")
    for turn in found.turns:
        made.add_row(*(cell.replace("[", r"\[") for cell in cells(found, turn, decode)))
    return made


def _ages(tokens: Tokens, here: slice) -> str:
    assert tokens.ages is not None and tokens.trainable is not None
    low, high = int(tokens.ages[here].min()), int(tokens.ages[here].max())
    masked = int((tokens.trainable[here] == 0).sum())
    return (str(low) if low == high else f"{low} to {high}") + (f" ({masked} masked)" if masked else "")


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f} s"
