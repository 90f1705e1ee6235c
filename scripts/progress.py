"""What a person sees while a run goes on: a live panel on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from stream_rl import config

RATE_WINDOW_SECONDS = 10.0


class Dashboard:
    """Shows the newest status of a run.  `phase` names what is going on before and after the steps."""

    def __init__(self, run: config.Run, plain_seconds: float) -> None:
        """plain_seconds: between lines where there is no terminal."""
        self._steps, self._seconds, self._plain_seconds = run.steps, run.seconds, plain_seconds
        self._console = Console()
        self._bar = Progress(
            TextColumn(f"[bold]{run.name}[/bold] {{task.description}}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total} steps"),
            TimeElapsedColumn(),
        )
        self._task = self._bar.add_task("starting", total=run.steps)
        self._live = Live(self._bar, console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        self._samples: list[tuple[float, float, float]] = []
        self._first_lease: float | None = None
        self._first_step: tuple[float, float] | None = None
        self._printed = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.__exit__(kind, error, trace)

    def phase(self, text: str) -> None:
        """Say what is going on now."""
        self._bar.update(self._task, description=text)
        if not self._live:
            self._console.print(f"  {text}", highlight=False)

    def note(self, text: str) -> None:
        """Say something that stays to be read."""
        self._console.print(f"  {text}", highlight=False, soft_wrap=True)

    def update(self, status: Mapping[str, Any], reward: float | None) -> None:
        """A new status of the queue (as `queues.summary` makes it), and the newest step's mean reward."""
        now, step = time.monotonic(), float(status.get("steps", 0))
        self._samples.append((now, float(status.get("generated_tokens", 0)), float(status.get("trained_tokens", 0))))
        while self._samples[0][0] < now - RATE_WINDOW_SECONDS:
            self._samples.pop(0)
        if self._first_lease is None and (step >= 1 or _groups(status).get("leased")):
            self._first_lease = now
        if step >= 1 and self._first_step is None:
            self._first_step = (now, step)
        self._bar.update(self._task, completed=step, description="training" if step < self._steps else "finishing")
        row = self._row(status, reward, now, step)
        if self._live:
            table = Table(*row, box=None, padding=(0, 2, 0, 0))
            table.add_row(*row.values())
            self._live.update(Group(self._bar, table))
        elif now - self._printed >= self._plain_seconds:
            self._printed = now
            self._console.print("  " + "  ".join(f"{k} {v}" for k, v in row.items()), highlight=False, soft_wrap=True)

    def _row(self, status: Mapping[str, Any], reward: float | None, now: float, step: float) -> dict[str, str]:
        start = self._samples[0]
        seconds = max(now - start[0], 1e-9)
        generated, trained = (self._samples[-1][i] - start[i] for i in (1, 2))
        states = _groups(status)
        age = float(status.get("token_age_mean", 0.0))
        age = 0.0 if math.isnan(age) else age
        return {
            "step": f"{step:.0f}/{self._steps}",
            "reward": "-" if reward is None or math.isnan(reward) else f"{reward:.3f}",
            "version": str(status.get("queue", {}).get("version", "-")),
            "generated": f"{generated / seconds:.0f} tok/s",
            "trained": f"{trained / seconds:.0f} tok/s",
            "age": f"{age:.2f} (max {status.get('token_age_max', 0)})",
            "groups": " ".join(f"{states[name]} {name.replace('_', ' ')}" for name in states if states[name]) or "-",
            "left": self._left(now, step),
        }

    def _left(self, now: float, step: float) -> str:
        """Until the last step, or until `run.seconds` are over, whichever comes first."""
        ends = []
        if self._first_step is not None and step > self._first_step[1]:
            pace = (now - self._first_step[0]) / (step - self._first_step[1])
            ends.append(pace * (self._steps - step))
        if self._seconds and self._first_lease is not None:
            ends.append(max(0.0, self._seconds - (now - self._first_lease)))
        return f"{min(ends):.0f} s" if ends else "?"


def _groups(status: Mapping[str, Any]) -> Mapping[str, int]:
    """How many groups of the queue are in each state."""
    states: Mapping[str, int] = status.get("queue", {}).get("groups", {})
    return states
