"""What an [algorithm] section must satisfy as a whole; its types and names are checked where it is read.

Imports no torch: the command's own checks start with it.
"""

from stream_rl.config import Algorithm
from stream_rl.errors import ConfigError

GROUP_RELATIVE = ("grpo", "centered", "rloo", "reinforce_plus_plus_baseline")
"""The estimators that compare the members of a group."""
DISCOUNTED = ("reinforce_plus_plus", "gae")
"""The estimators that `gamma` is for."""
MASK_NAMES = ("token", "sequence", "geometric", "veto")


def check(section: Algorithm) -> None:
    """Raises ConfigError for values out of range, and for settings that would have no effect or not fit together."""
    if not (0.0 < section.clip_low <= 1.0 and section.clip_high > 0.0 and section.importance_cap >= 1.0):
        raise ConfigError(
            f"algorithm needs 0 < clip_low <= 1, clip_high > 0 and importance_cap >= 1, got {section.clip_low}, "
            f"{section.clip_high} and {section.importance_cap}"
        )
    if section.loss != "ppo_clip" and section.importance != "ratio":
        raise ConfigError(
            f'algorithm.loss = "{section.loss}" needs importance = "ratio", got "{section.importance}": the ratio to '
            "the policy that a step begins with is always 1, so it would clip nothing"
        )
    if not section.dual_clip > 1.0:
        raise ConfigError(f"algorithm.dual_clip must be above 1, got {section.dual_clip}")
    if section.aggregation == "constant" and not section.constant > 0.0:
        raise ConfigError(
            f'algorithm.constant must be positive with aggregation = "constant", got {section.constant}; set it'
        )
    if not section.value_clip >= 0.0:
        raise ConfigError(f"algorithm.value_clip must be 0 (not clipped) or above, got {section.value_clip}")
    _check_masks(section)
    _check_rewards(section)


def _check_masks(section: Algorithm) -> None:
    for name, (low, high) in section.masks.items():
        if name not in MASK_NAMES:
            raise ConfigError(f"algorithm.masks has {list(MASK_NAMES)}, got {name!r}")
        if not 0.0 <= low < 1.0 < high:
            raise ConfigError(
                f"algorithm.masks.{name} must be [low, high] with 0 <= low < 1 < high, got {[low, high]}: "
                "1 is a token of the current policy itself"
            )


def _check_rewards(section: Algorithm) -> None:
    if not (0.0 <= section.gamma <= 1.0 and 0.0 <= section.gae_lambda <= 1.0):
        raise ConfigError(
            f"algorithm.gamma and gae_lambda must be within 0 and 1, got {section.gamma} and {section.gae_lambda}"
        )
    if section.gamma != 1.0 and section.advantage not in DISCOUNTED:
        raise ConfigError(
            f'algorithm.gamma = {section.gamma} has no effect with advantage = "{section.advantage}"; it is for '
            f"{' and '.join(DISCOUNTED)}"
        )
    if not section.kl_coefficient >= 0.0:
        raise ConfigError(f"algorithm.kl_coefficient must be 0 (no reference) or above, got {section.kl_coefficient}")
    buffer, longest = section.overlong_buffer, section.overlong_length
    if not (0 <= buffer <= longest or buffer == 0) or not section.overlong_penalty >= 0.0:
        raise ConfigError(
            "algorithm needs 0 <= overlong_buffer <= overlong_length and overlong_penalty >= 0, got "
            f"{buffer}, {longest} and {section.overlong_penalty}"
        )
    shaped = (section.kl_coefficient > 0.0 and section.kl_in == "reward") or buffer > 0
    if section.advantage == "distillation" and shaped:
        raise ConfigError(
            'algorithm.advantage = "distillation" looks at no reward, so overlong_buffer must be 0 and kl_in must be '
            f'"loss", got {buffer} and "{section.kl_in}"'
        )
