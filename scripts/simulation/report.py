"""What a simulation came to: a table, a plot, and a file for benchmarks."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from scripts.simulation.claims import Claim
from scripts.simulation.outcome import DECILES, Outcome
from scripts.simulation.setting import Setting
from stream_rl.errors import ConfigError
from stream_rl.metrics import finite

WIDTH = 168
COLUMNS = (
    "policy", "trained/s", "sampled/s", "age", "p99", "max", "masked", "by length decile", "wholly", "dropped",
    "wasted", "bias", "idle", "engines", "under way",
)  # fmt: skip
LEGEND = (
    "Tokens a second; age in versions, of trained tokens; masked: share of sampled tokens, also by tenths of true "
    "length (% each, shortest first), and trajectories masked wholly; wasted: tokens masked or dropped; bias: mean "
    "length of trained over started trajectories; idle: learner's time without a lease; engines: tokens, over those of "
    "full ones; under way: groups allowed, in steps' worth."
)


def console() -> Console:
    """As wide as the table, also where there is no terminal."""
    return Console(width=max(WIDTH, Console().width), highlight=False)


def show(outcomes: Sequence[Outcome], found: Sequence[Claim]) -> None:
    table = Table(pad_edge=False, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(*_row(outcome))
    screen = console()
    screen.print(table)
    screen.print(LEGEND)
    screen.print()
    for outcome in outcomes:
        screen.print(f"{outcome.policy:21} {outcome.says}")
    if found:
        screen.print()
    for claim in found:
        screen.print(f"{'holds' if claim.holds else 'DOES NOT HOLD'}: {claim.says}\n       {claim.figures}")


def _row(o: Outcome) -> list[str]:
    deciles = " ".join(f"{100 * share:.0f}" for share in o.masked_by_decile)
    return [
        o.policy, f"{o.trained_tokens_per_s:,.0f}", f"{o.generated_tokens_per_s:,.0f}", f"{o.age_mean:.2f}",
        f"{o.age_p99:.0f}", f"{o.age_max}", f"{o.masked_share:.1%}", deciles if o.masked_share else "-",
        f"{o.wholly_masked}", f"{o.dropped}", f"{o.wasted_share:.1%}", f"{o.length_bias:.2f}",
        f"{o.learner_idle_share:.0%}", f"{o.engine_use:.0%}", f"{o.groups_under_way:.1f}",
    ]  # fmt: skip


def write(
    path: pathlib.Path, command: str, setting: Setting, outcomes: Sequence[Outcome], found: Sequence[Claim]
) -> None:
    """Add to the runs in a JSON file, in place of one that the same command made.  Raises ConfigError for a file of
    something else."""
    held = _held(path) if path.exists() else {"runs": {}}
    held["runs"][command] = {
        "setting": dataclasses.asdict(setting),
        "claims": [dataclasses.asdict(claim) for claim in found],
        "policies": {outcome.policy: _plain(outcome) for outcome in outcomes},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(held), indent=1) + "\n")


def _held(path: pathlib.Path) -> dict[str, Any]:
    try:
        held: dict[str, Any] = json.loads(path.read_text())
        held["runs"] = dict(held["runs"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no runs of simulate ({error!r}); name another file") from error
    return held


def _plain(outcome: Outcome) -> dict[str, Any]:
    fields = dataclasses.asdict(outcome)
    del fields["policy"], fields["groups_under_way_by_step"]
    return {name: _rounded(value) for name, value in fields.items()}


def _rounded(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_rounded(value) for value in tree]
    return float(f"{tree:.4g}") if isinstance(tree, float) else tree


def plot(path: pathlib.Path, setting: Setting, outcomes: Sequence[Outcome]) -> None:
    """Throughput over age, what the mask costs by length, and how the steered limit moved."""
    figure, (rate, masked, limit) = plt.subplots(3, 1, figsize=(9, 13), constrained_layout=True)
    figure.suptitle(f"{setting.lengths}: {setting.steps} steps of {setting.step_tokens:,} tokens")
    fixed = [o for o in outcomes if o.policy.startswith("fixed_")]
    rate.plot([o.age_mean for o in fixed], [o.trained_tokens_per_s for o in fixed], "-", color="0.7")
    for outcome in outcomes:
        marker = "o" if outcome in fixed else "*" if outcome.policy.startswith("steered") else "s"
        rate.plot(outcome.age_mean, outcome.trained_tokens_per_s, marker, label=outcome.policy)
        rate.annotate(outcome.policy, (outcome.age_mean, outcome.trained_tokens_per_s), fontsize=7)
    rate.set(xlabel="mean age of trained tokens (versions)", ylabel="trained tokens/s", ylim=(0, None))

    for outcome in outcomes:
        if outcome.masked_share > 0:
            masked.plot(range(1, DECILES + 1), outcome.masked_by_decile, ".-", label=outcome.policy)
    masked.set(xlabel="decile of true length", ylabel="masked share of tokens")
    if masked.lines:
        masked.legend(fontsize=7)

    for outcome in outcomes:
        if outcome.policy.startswith(("steered", "streaming_correction")):
            limit.plot(outcome.groups_under_way_by_step, label=outcome.policy)
    limit.set(xlabel="step", ylabel="groups allowed under way", ylim=(0, None))
    if limit.lines:
        limit.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
