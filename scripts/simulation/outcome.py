"""What a simulated run comes to, without its first steps."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from scripts.simulation.setting import SETTLING_SHARE
from scripts.simulation.world import World
from stream_rl.types import Int64Array

DECILES = 10
LAST_SHARE = 0.2
"""Of the steps: groups that were opened in them are not asked what became of them, since the longest are under way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    policy: str
    says: str
    steps: int
    trained_tokens_per_s: float
    generated_tokens_per_s: float
    age_mean: float
    """Of trained tokens, in versions, as all ages."""
    age_p99: float
    age_max: int
    masked_share: float
    """Of the sampled tokens of the trajectories that came to be trained."""
    masked_by_decile: list[float]
    """The same by their true length, the shortest tenth first."""
    wholly_masked: int
    """Trajectories of which no token trained."""
    dropped: int
    """Trajectories thrown away before they trained."""
    wasted_share: float
    """Of the tokens that trained, were masked or were dropped: all but the first."""
    length_bias: float
    """Mean true length of the trajectories that trained, over that of all that were started beside them."""
    versions_spanned: float
    """From the first to the last token of a trajectory, in the mean."""
    learner_idle_share: float
    engine_use: float
    """Tokens generated, over those of engines with every slot taken."""
    groups_under_way: float
    """Allowed at most, in steps' worth, in the mean over the steps."""
    groups_under_way_by_step: list[int]
    """Allowed at most, after each step from the first."""

    def plain(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def outcome(world: World) -> Outcome:
    steps = world.learner.steps
    first = math.floor(SETTLING_SHARE * len(steps))
    begin, measured = steps[first - 1], steps[first:]
    seconds = measured[-1].applied_s - begin.applied_s
    ages = _sum_ragged([step.ages for step in measured])
    sampled, trained, too_old = (
        np.concatenate([getattr(step, name) for step in measured]) for name in ("sampled", "trained", "too_old")
    )
    whole = too_old == 0
    true = np.array([
        world.actor.members[group, member].episode.tokens
        for step in measured
        for group, member in zip(step.groups.tolist(), step.members.tolist(), strict=True)
    ])  # fmt: skip
    masked = int((sampled - trained)[whole].sum())
    late = int(sampled[~whole].sum())
    before, after, books = world.books[first - 1], world.books[-1], world.books[first:]
    dropped_tokens = after.dropped_tokens - before.dropped_tokens + late
    generated = after.generated_tokens - before.generated_tokens
    return Outcome(
        policy=world.policy.name,
        says=world.policy.says,
        steps=len(measured),
        trained_tokens_per_s=float(trained.sum() / seconds),
        generated_tokens_per_s=generated / seconds,
        age_mean=float((ages * np.arange(len(ages))).sum() / ages.sum()),
        age_p99=float(np.searchsorted(np.cumsum(ages), 0.99 * ages.sum())),
        age_max=int(np.flatnonzero(ages).max()),
        masked_share=masked / int(sampled[whole].sum()),
        masked_by_decile=_by_decile(true[whole], sampled[whole], trained[whole]),
        wholly_masked=int((whole & (trained == 0) & (sampled > 0)).sum()) + after.hopeless - before.hopeless,
        dropped=int((~whole).sum()) + after.dropped - before.dropped,
        wasted_share=(masked + dropped_tokens) / (int(trained.sum()) + masked + dropped_tokens),
        length_bias=_length_bias(world, first),
        versions_spanned=float(np.concatenate([step.spanned for step in measured]).mean()),
        learner_idle_share=sum(step.leased_s - step.began_s for step in measured) / seconds,
        engine_use=generated / seconds / world.setting.engines_tokens_per_s,
        groups_under_way=sum(each.limit for each in books) / len(measured) / world.setting.groups,
        groups_under_way_by_step=[each.limit for each in world.books],
    )


def _by_decile(true: Int64Array, sampled: Int64Array, trained: Int64Array) -> list[float]:
    order = np.argsort(true, kind="stable")
    tenths = [(int(sampled[part].sum()), int(trained[part].sum())) for part in np.array_split(order, DECILES)]
    return [1 - kept / total if total else 0.0 for total, kept in tenths]


def _length_bias(world: World, first: int) -> float:
    steps = world.learner.steps
    since, until = steps[first].applied_s, steps[-max(1, round(LAST_SHARE * len(steps)))].applied_s
    started = {group for at, group in world.actor.opened if since <= at < until}
    members = world.actor.members
    lengths = [members[group, n].episode.tokens for group in started for n in range(world.setting.group_size)]
    trained = [
        members[group, n].episode.tokens
        for step in steps
        for group, n, tokens in zip(step.groups.tolist(), step.members.tolist(), step.trained.tolist(), strict=True)
        if tokens and group in started
    ]
    return (sum(trained) / len(trained)) / (sum(lengths) / len(lengths)) if trained and lengths else math.nan


def _sum_ragged(rows: list[Int64Array]) -> Int64Array:
    total = np.zeros(max(len(row) for row in rows), np.int64)
    for row in rows:
        total[: len(row)] += row
    return total
