"""`stream-rl bench engine`: rounds are whole and turn, and ratios are of the same round."""

import pytest

from scripts.bench.engine import Burst, Plan, figures, measure
from stream_rl.errors import ConfigError


def plan(rounds: int = 10, sse_rounds: int = 3, rates: tuple[float, ...] = (0.5, 2.0)) -> Plan:
    return Plan(
        tiny=True, requests=4, tokens=8, rounds=rounds, sse_rounds=sse_rounds, rates=rates, seconds=60.0, options={}
    )


def test_every_round_has_every_arm_once_and_begins_and_ends_with_others() -> None:
    arms = {"plain", "plugin", "updates-0.5", "updates-2"}
    orders = [plan().arms(number) for number in range(10)]
    assert all(sorted(order) == sorted(arms | {"sse", "incremental"}) for order in orders[:3])
    assert all(sorted(order) == sorted(arms) for order in orders[3:])
    assert len({order[0] for order in orders[3:]}) == len(arms)
    before = [order.index("plugin") < order.index("plain") for order in orders]
    assert 0 < sum(before) < len(before), "neither always goes first"


def test_ratios_are_of_bursts_of_the_same_round() -> None:
    rounds = [
        {"plain": Burst(speed, 100), "plugin": Burst(speed / 0.9, 100), "updates-2": Burst(speed / 0.5, 100, 4)}
        for speed in (1.0, 2.0, 10.0)
    ]
    found = figures(rounds)
    assert found["arms"]["plugin"]["ratio"]["mean"] == pytest.approx(0.9)
    assert found["arms"]["plugin"]["ratio"]["low"] == pytest.approx(0.9), "the machine's own drift is not in them"
    assert found["arms"]["updates-2"]["versions_per_second"] == pytest.approx(12 / 26)
    assert found["met"] == {"plugin": False, "updates-2": False}


def test_what_was_not_measured_meets_nothing() -> None:
    found = figures([{"plain": Burst(1.0, 100)}])
    assert found["met"] == {"plugin": False, "updates-2": False} and found["arms"]["plain"]["ratio"] is None


@pytest.mark.parametrize("wrong", [{"rounds": 2}, {"rates": (0.0,)}])
def test_a_plan_that_cannot_be_carried_out_is_an_error(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        measure(plan(**wrong), print)  # type: ignore[arg-type]
