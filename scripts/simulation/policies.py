"""The policies that are compared.

Most are configurations of the queue itself.  What the queue would never do (stop the world between batches, drop what
is too old) is done to it from outside, by what the simulated actor and learner ask for.
"""

from dataclasses import dataclass
from typing import Any, Literal

from scripts.simulation.setting import Setting
from stream_rl.config import Queue
from stream_rl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    says: str
    queue: dict[str, Any]
    """Changes of the queue's recipe.  Where they say nothing, tokens older than the setting's bound are masked."""
    batch_lag: int | None = None
    """Whole batches, each sampled by one version that is so many steps older than the one that it trains; new weights
    wait until no engine runs.  None: no batches."""
    stale: Literal["train", "drop", "abort"] = "train"
    """What becomes of a trajectory whose oldest token is older than `max_staleness`: it trains (or its old tokens are
    masked), is dropped when it has ended and before it trains, or is stopped in flight as well."""

    def configure(self, setting: Setting) -> Queue:
        return setting.queue(**self.queue)


def policies(setting: Setting) -> dict[str, Policy]:
    """All, by name, in the order in which they are shown."""
    # Everything that is ready makes a step, and admission never says no: batches are the actor's business.
    batches = {"min_tokens": 1, "max_tokens": 1 << 40, "over_provision": 2.0 * setting.groups, "max_token_age": -1}
    bound, target = setting.max_staleness, setting.target_token_age
    unbounded, steered = {"max_token_age": -1}, {"in_flight": "steered"}
    young = {"target_token_age": target / 2}
    admission = f"at most {setting.ratio:g} steps' worth under way"
    found = [
        Policy("synchronous", "sample a batch, then train on it", batches, batch_lag=0),
        Policy("one_step_off", "sample a batch while training on the last", batches, batch_lag=1),
        Policy("april_rounds", "stop at a step's tokens, resume first", {"mode": "rounds"}),
        Policy("admission", f"{admission}, no bound on age", unbounded),
        Policy("admission_drop", f"{admission}, drop what ended older than {bound}", unbounded, stale="drop"),
        Policy("admission_abort", f"{admission}, stop what is older than {bound}", unbounded, stale="abort"),
        Policy("streaming_mask", f"{admission}, mask tokens older than {bound}", {"max_token_age": bound}),
        Policy("streaming_correction", "steered, no mask: corrections carry the age", steered | unbounded),
        *(
            Policy(f"fixed_{ratio:g}", f"{ratio:g} steps' worth under way", {"over_provision": ratio})
            for ratio in setting.ratios
        ),
        Policy("steered", f"steers itself, age at most {target:g}", steered),
        Policy("steered_young", f"steers itself, age at most {target / 2:g}", steered | young),
    ]
    return {policy.name: policy for policy in found}


def choose(setting: Setting, names: str) -> list[Policy]:
    """All policies, or those named, with commas between them.  Raises ConfigError naming those that there are."""
    known = policies(setting)
    if names == "all":
        return list(known.values())
    if unknown := [name for name in names.split(",") if name not in known]:
        raise ConfigError(f"no policy {unknown[0]!r}; there are {', '.join(known)} and all")
    return [known[name] for name in names.split(",")]
