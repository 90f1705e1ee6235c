"""What the simulation is to show, each with the figures that it rests on, whether it holds or not."""

from collections.abc import Mapping
from dataclasses import dataclass

from scripts.simulation.outcome import Outcome
from scripts.simulation.setting import Setting

BIASED = 0.7
"""Trained over started mean length."""
WHOLE = 0.9
"""The same, of a policy that lets long trajectories be."""
NO_MORE = 0.02
"""Relative differences below this are none."""
NEARLY_AS_FAST = 0.1


@dataclass(frozen=True, slots=True)
class Claim:
    says: str
    holds: bool
    figures: str


def claims(setting: Setting, outcomes: Mapping[str, Outcome]) -> list[Claim]:
    """Those that the outcomes are there for."""
    found = []
    if {"admission_drop", "admission_abort"} <= outcomes.keys():
        found.append(_dropping_biases(outcomes["admission_drop"], outcomes["admission_abort"]))
    if "streaming_mask" in outcomes:
        found.append(_mask_is_exact(setting, outcomes["streaming_mask"]))
    fixed = [outcomes[name] for ratio in setting.ratios if (name := f"fixed_{ratio:g}") in outcomes]
    if len(fixed) > 1:
        found.append(_knee(fixed))
        found += [_steers(fixed, outcomes["steered"])] if "steered" in outcomes else []
    if "steered_young" in outcomes:
        found.append(_keeps_young(setting.target_token_age / 2, outcomes["steered_young"]))
    return found


def best(fixed: list[Outcome]) -> Outcome:
    return max(fixed, key=lambda outcome: outcome.trained_tokens_per_s)


def knee(fixed: list[Outcome]) -> Outcome:
    """The smallest ratio that is as fast as the fastest."""
    enough = (1 - NO_MORE) * best(fixed).trained_tokens_per_s
    return next(outcome for outcome in fixed if outcome.trained_tokens_per_s >= enough)


def _dropping_biases(drop: Outcome, abort: Outcome) -> Claim:
    return Claim(
        f"dropping or stopping stale work biases training to short trajectories (below {BIASED})",
        max(drop.length_bias, abort.length_bias) < BIASED,
        f"trained over started mean length: dropped {drop.length_bias:.2f} ({drop.wasted_share:.0%} wasted), "
        f"stopped {abort.length_bias:.2f} ({abort.wasted_share:.0%} wasted)",
    )


def _mask_is_exact(setting: Setting, mask: Outcome) -> Claim:
    bound = setting.max_staleness
    return Claim(
        "the token-age mask keeps trajectories whole at the same bound, exactly",
        mask.age_max <= bound and not mask.dropped and mask.length_bias > WHOLE,
        f"oldest trained token {mask.age_max} of {bound}, {mask.dropped} dropped, length bias {mask.length_bias:.2f}; "
        f"it costs {mask.masked_share:.0%} of the tokens, {mask.masked_by_decile[0]:.0%} of the shortest and "
        f"{mask.masked_by_decile[-1]:.0%} of the longest tenth, and all of {mask.wholly_masked} trajectories",
    )


def _knee(fixed: list[Outcome]) -> Claim:
    at, most = knee(fixed), fixed[-1]
    gain = most.trained_tokens_per_s / at.trained_tokens_per_s - 1
    return Claim(
        "past the knee, over-provisioning adds age and no throughput",
        at is not most and gain <= NO_MORE / (1 - NO_MORE) and most.age_mean > (1 + NO_MORE) * at.age_mean,
        f"{at.policy} is the knee; {most.policy} trains {gain:+.1%} tokens a second at mean age "
        f"{most.age_mean:.2f} for {at.age_mean:.2f}, masked {most.masked_share:.1%} for {at.masked_share:.1%}",
    )


def _steers(fixed: list[Outcome], steered: Outcome) -> Claim:
    fastest, at = best(fixed), knee(fixed)
    rate = steered.trained_tokens_per_s
    return Claim(
        f"steering itself it lands within {NEARLY_AS_FAST:.0%} of the best fixed ratio at no more than its age",
        rate >= (1 - NEARLY_AS_FAST) * fastest.trained_tokens_per_s and steered.age_mean <= fastest.age_mean,
        f"{rate / fastest.trained_tokens_per_s:.1%} of {fastest.policy} at mean age {steered.age_mean:.2f} for "
        f"{fastest.age_mean:.2f}; {rate / at.trained_tokens_per_s:.1%} of {at.policy} (the knee), which has "
        f"{at.age_mean:.2f}",
    )


def _keeps_young(target: float, steered: Outcome) -> Claim:
    return Claim(
        "steering itself it keeps the mean age of trained tokens near a target that is below the knee's",
        steered.age_mean <= 1.1 * target,
        f"mean age {steered.age_mean:.2f} for a target of {target:g}, {steered.trained_tokens_per_s:,.0f} trained/s",
    )
