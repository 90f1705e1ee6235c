"""How long every trajectory will be, known before it starts.

    lognormal:SIGMA   tokens are log-normal
    agent:VERSIONS    turns with an environment in between; an episode takes about so many versions
    turns:SHARE       the same, as segments that the queue knows; environments take this share of an episode's time
    recorded:RUN      tokens drawn from what the trajectories of a run came to

A group's episodes depend on the seed and its number alone: all policies meet the same ones, whatever they do to them.
"""

import math
import pathlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from queues.database import Database
from queues.journal import unpack
from scripts.simulation.setting import Setting, number
from stream_rl import wire
from stream_rl.errors import ConfigError, WireError
from stream_rl.types import Status

KINDS = "lognormal:SIGMA, agent:VERSIONS, turns:SHARE or recorded:RUN"
AGENT_SIGMA = 0.7
"""Spread of agents' tokens and of their environments' times."""
AGENT_TURNS = 8


@dataclass(frozen=True, slots=True)
class Episode:
    """What a trajectory would be if nobody cut it."""

    tokens: int
    waits: tuple[tuple[int, float], ...] = ()
    """(tokens sampled by then, seconds that the environment takes), in order."""
    apart: bool = False
    """Each turn is a segment of its own, and what the environment says is appended behind it."""


class Lengths(Protocol):
    def draw(self, rng: np.random.Generator, members: int) -> list[Episode]: ...


class LogNormal:
    def __init__(self, setting: Setting, sigma: float) -> None:
        self._setting, self._sigma = setting, sigma

    def draw(self, rng: np.random.Generator, members: int) -> list[Episode]:
        return [Episode(tokens) for tokens in _tokens(rng, self._setting, self._sigma, members)]


class Agent:
    """Turns of sampling with an environment in between, over a given number of versions in the mean."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        total_s = setting.versions_spanned * setting.nominal_step_s - setting.mean_tokens * setting.full_step_s
        self._wait_s = max(0.1 * setting.nominal_step_s, total_s) / (AGENT_TURNS - 1)

    def draw(self, rng: np.random.Generator, members: int) -> list[Episode]:
        episodes = []
        for tokens in _tokens(rng, self._setting, AGENT_SIGMA, members):
            ends = sorted({tokens * turn // AGENT_TURNS for turn in range(1, AGENT_TURNS)} - {0})
            slowness = rng.lognormal(-(AGENT_SIGMA**2) / 2, AGENT_SIGMA)
            waits = self._wait_s * slowness * rng.exponential(1.0, len(ends))
            episodes.append(Episode(tokens, tuple(zip(ends, waits.tolist(), strict=True))))
        return episodes


class Turns:
    """Log-normal tokens in turns, and log-normal waits in proportion to them."""

    def __init__(self, setting: Setting, share: float) -> None:
        if not share < 1:
            raise ConfigError(f"--lengths {setting.lengths}: environments take a share of the time below 1")
        self._setting, self._wait_token_s = setting, setting.full_step_s * share / (1 - share)

    def draw(self, rng: np.random.Generator, members: int) -> list[Episode]:
        episodes = []
        for tokens in _tokens(rng, self._setting, AGENT_SIGMA, members):
            ends = sorted({tokens * turn // AGENT_TURNS for turn in range(1, AGENT_TURNS)} - {0})
            drawn = rng.lognormal(-(AGENT_SIGMA**2) / 2, AGENT_SIGMA, len(ends))
            waits = drawn * tokens * self._wait_token_s / max(1, len(ends))
            episodes.append(Episode(tokens, tuple(zip(ends, waits.tolist(), strict=True)), apart=True))
        return episodes


class Recorded:
    def __init__(self, setting: Setting, tokens: list[int]) -> None:
        scale = setting.mean_tokens / (sum(tokens) / len(tokens))
        self._tokens = np.clip(np.round(np.array(tokens) * scale), 1, setting.most_tokens).astype(int)

    def draw(self, rng: np.random.Generator, members: int) -> list[Episode]:
        return [Episode(tokens) for tokens in rng.choice(self._tokens, members).tolist()]


def make(setting: Setting) -> Lengths:
    """What `setting.lengths` asks for.  Raises ConfigError, or JournalError for a run that cannot be read."""
    kind, _, argument = setting.lengths.partition(":")
    if kind == "lognormal":
        return LogNormal(setting, number(setting.lengths, argument))
    if kind == "agent":
        return Agent(setting)
    if kind == "turns":
        return Turns(setting, number(setting.lengths, argument))
    if kind == "recorded":
        return Recorded(setting, recorded(pathlib.Path(argument)))
    raise ConfigError(f"--lengths is {KINDS}, got {setting.lengths!r}")


def recorded(run: pathlib.Path) -> list[int]:
    """Sampled tokens of every trajectory that a run's journal knows the end of.  Raises ConfigError, JournalError."""
    path = journal_of(run)
    database = Database(path, readonly=True)
    try:
        frames = [row for (row,) in database.query("SELECT frames FROM events WHERE kind = 'CloseTrajectory'")]
    finally:
        database.close()
    try:
        closes = [wire.decode(unpack(row)) for row in frames]
    except (WireError, ValueError) as error:
        raise ConfigError(f"{path}: a CloseTrajectory of it cannot be read: {error}") from error
    tokens = [close.num_sampled for close in closes if close.status == Status.DONE and close.num_sampled > 0]
    if not tokens:
        raise ConfigError(f"{path}: no trajectory of this run has ended; name another run")
    return tokens


def journal_of(run: pathlib.Path) -> pathlib.Path:
    """The journal in a run's directory, or the file itself.  Raises ConfigError."""
    path = run / "journal.db" if run.is_dir() else run
    if not path.exists():
        raise ConfigError(f"no journal {path}; expected the directory of a run, such as runs/quickstart")
    return path


def _tokens(rng: np.random.Generator, setting: Setting, sigma: float, members: int) -> list[int]:
    """Log-normal with the setting's mean.  A part of the spread is between prompts: members of a group are alike."""
    prompt = math.sqrt(setting.prompt_share) * rng.standard_normal()
    own = math.sqrt(1 - setting.prompt_share) * rng.standard_normal(members)
    drawn = setting.mean_tokens * np.exp(sigma * (prompt + own) - sigma**2 / 2)
    tokens: list[int] = np.clip(drawn.round(), 1, setting.most_tokens).astype(int).tolist()
    return tokens
