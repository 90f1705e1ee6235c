"""What a person sees while a run goes on: how long it still takes, by steps or by time."""

import pytest

from scripts import progress
from stream_rl import config


@pytest.mark.parametrize(
    ("steps", "seconds", "left"),
    [
        (5, 0.0, ["?", "?", "?", "30", "20"]),  # from the second step on, by the pace between steps
        (10**5, 100.0, ["?", "100", "90", "80", "70"]),  # of the first lease's 100 seconds
        (5, 45.0, ["?", "45", "35", "25", "15"]),
        (5, 1000.0, ["?", "1000", "990", "30", "20"]),
        (5, 15.0, ["?", "15", "5", "0", "0"]),
    ],
)
def test_what_is_left_is_by_steps_or_by_time_whichever_is_over_first(
    steps: int,
    seconds: float,
    left: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Dashboard(config.Run(name="run", steps=steps, seconds=seconds), plain_seconds=0.0) as dashboard:
        for step, groups in ((0, {"in_flight": 3}), (0, {"leased": 1}), (1, {}), (2, {}), (3, {})):
            now[0] += 10.0
            dashboard.update({"steps": step, "queue": {"groups": groups}}, None)
    lines = [line for line in capsys.readouterr().out.splitlines() if "left" in line]
    assert [line.split("  left ")[1].removesuffix(" s") for line in lines] == left
