"""The queue's part of the run's summary: what the tallies and the books say, under the names that people read."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from queues.ledger import Ledger, State
from queues.tallies import Settled, Tallies, Window
from queues.waits import growing
from stream_rl.messages import Applied, Lease, StepRecord
from stream_rl.metrics import quantile

if TYPE_CHECKING:
    from queues.core import QueueCore


def summary(core: "QueueCore") -> dict[str, object]:
    """Numbers and texts by name, nested where a thing has several; NaN where nothing is known yet."""
    tallies, ledger = core.tallies, core.ledger
    counter = tallies.engine_counter
    sampled = tallies.trained + sum(tallies.masked.values())
    done = tallies.learner_done
    verified = {v.weights_hash for v in tallies.verified.values()}
    return {
        "reward_first": _reward_tenth(tallies, last=False),
        "reward_last": _reward_tenth(tallies, last=True),
        "heldout_first": tallies.evaluated.get("first", math.nan),
        "heldout_last": tallies.evaluated.get("last", math.nan),
        "steps": tallies.steps,
        "skipped_steps": tallies.skipped,
        "short_leases": tallies.short_leases,
        "versions": sum(version.step > 0 for version in tallies.versions),
        "trained_tokens": tallies.trained,
        "generated_tokens": int(max(counter("generated_tokens"), ledger.received)),
        "received_tokens": ledger.received,
        "streamed_before_end": _share(tallies.streamed_before_end, ledger.received),
        "token_age_mean": _share(sum(age * count for age, count in tallies.ages.items()), tallies.trained),
        "token_age_p99": _age_quantile(tallies, 0.99),
        "token_age_max": max(tallies.ages, default=0),
        "masked_share": _share(tallies.masked["too_old"], sampled),
        "masked_by_length": masked_by_length(tallies),
        "wholly_masked": sum(m == n for n, m in zip(tallies.lengths, tallies.too_old, strict=True)),
        "length_bias": _length_bias(tallies, ledger),
        "resumed": {"engine_lost": 0} | tallies.resumed,
        "turns": tallies.turns,
        "branches": tallies.branches,
        "appended_tokens": tallies.appended_tokens,
        "forked_steps": tallies.forked_steps,
        "tasks": {
            name.replace(".", "_"): {
                "opened": task.opened,
                "applied": task.applied,
                "dropped": task.dropped,
                "longest_s": round(task.longest_s, 3),
            }
            for name, task in tallies.tasks.items()
        },
        "dropped": {"run_end": 0} | ledger.dropped,
        "cancelled": dict(tallies.cancelled),
        "refused": dict(tallies.refused),
        "aborted_requests": tallies.aborted,
        "engine_aborts": int(counter("aborts")),
        "generation_pauses": int(counter("pauses")),
        "retractions": int(counter("retractions")),
        "plugin_faults": int(counter("faults")),
        "delta_bytes": tallies.delta_bytes,
        "full_bytes": tallies.full_bytes,
        "anchors": tallies.anchors,
        "update_stall_ms_p50": quantile(list(tallies.stalls_ms), 0.5),
        "update_stall_ms_p99": quantile(list(tallies.stalls_ms), 0.99),
        "decode_step_ms_p50": 1000 * tallies.engine_histogram("decode_step_seconds").quantile(0.5),
        "plugin_cpu_share": _share(counter("hook_cpu_seconds"), counter("scheduler_cpu_seconds")),
        "plugin_thread_cpu_share": _share(counter("thread_cpu_seconds"), counter("scheduler_cpu_seconds")),
        "engine_busy_s": counter("busy_seconds"),
        "learner_busy_s": tallies.learner_busy_s,
        "engine_busy": _share(counter("busy_seconds"), counter("wall_seconds")),
        "learner_busy": _share(tallies.learner_busy_s, tallies.learner_wall_s),
        "stock": {name.replace(".", "_"): dict(counts) for name, counts in tallies.stock.items()},
        "hash_mismatches": tallies.hash_mismatches,
        "weights_hash_engine": ",".join(sorted(verified)),
        "weights_hash_learner": done.weights_hash if done else "",
        "conserved": not ledger.violations(),
    }


def progress(core: "QueueCore") -> dict[str, object]:
    """Where things are at this moment, and what is being waited for."""
    ledger = core.ledger
    peers: dict[str, Any] = {}
    for peer in core.registry.peers.values():
        fields: dict[str, object] = {
            "role": peer.role,
            "incarnation": peer.incarnation,
            "lost": float(peer.lost),
            "silent_s": max(0.0, core.now - peer.seen),
        }
        if peer.version is not None:
            fields["version"] = str(peer.version)
            fields["version_step"] = peer.version.step
        peers[peer.name.replace(".", "_")] = fields
    window = core.tallies.windows[-1]
    return {
        "queue": {
            "version": str(core.histories.last),
            "version_step": core.histories.last.step,
            "trajectories": {state.value: ledger.trajectories[state] for state in State},
            "tokens": {state.value: count for state, count in ledger.tokens.items()},
            "opened": ledger.admitted,
            "groups": {
                state.value: core.store.group_counts[state] for state in (State.IN_FLIGHT, State.READY, State.LEASED)
            },
            "admitted": sum(len(groups) for groups in core.admitted.values()),
            "resting": core.store.resuming.resting,
            "waiting_for_environment": sum(t.asks_nobody for t in growing(core)),
            "occupancy": core.store.admission.occupancy,
            "again": len(core.steps.again),
            "outstanding_limit": core.store.admission.limit,
            "ready_trainable_tokens": core.store.ready.trainable_tokens,
            "awaits": "; ".join(core.awaits(most=8)),
            "finished_this_step": window.finished,
            "reward_this_step": window.reward_mean,
            "last_refusal": core.tallies.last_refusal,
        },
        "peers": peers,
    }


def step_record(core: "QueueCore", event: Applied, lease: Lease, settled: Settled, window: Window) -> StepRecord:
    """One line of the run's metrics: the step, its lease, and what finished while it was awaited."""
    fields = {f"learner.{name}": value for name, value in event.metrics.items()}
    fields |= {f"reward.{name}": total / max(window.finished, 1) for name, total in window.parts.items()}
    fields |= {
        "seconds": core.now - (core.started or 0.0),
        "reward_mean": window.reward_mean,
        "finished": window.finished,
        "finished_tokens_mean": window.sampled / max(window.finished, 1),
        "finished_turns_mean": window.turns / max(window.finished, 1),
        "trained": float(event.outcome == "trained"),
        "lease_groups": len(np.unique(lease.groups)),
        "lease_trajectories": len(lease.lengths),
        "lease_branches": int((lease.episodes != lease.members).sum()),
        "lease_tokens": len(lease.token_ids),
        "lease_reward_mean": float(lease.rewards.mean()),
        "trained_tokens": settled.trained,
        "masked_tokens": settled.masked["too_old"],
        "token_age_mean": settled.age_mean,
        "token_age_max": max(settled.ages, default=0),
        "received_tokens_total": core.ledger.received,
        "trained_tokens_total": core.tallies.trained,
        "appended_tokens_total": core.tallies.appended_tokens,
        "in_flight": core.ledger.trajectories[State.IN_FLIGHT],
        "ready": core.ledger.trajectories[State.READY],
        "dropped_total": core.ledger.trajectories[State.DROPPED],
    }
    return StepRecord(step=event.step, fields={name: float(value) for name, value in fields.items()})


def _reward_tenth(tallies: Tallies, last: bool) -> float:
    """Mean over the trajectories that finished in the first or last tenth of the steps taken, also those of dead
    histories: what finished while one was awaited was learned from later."""
    taken = tallies.windows[:-1]
    tenth = max(1, len(taken) // 10)
    windows = taken[-tenth:] if last else taken[:tenth]
    return _share(sum(w.rewards for w in windows), sum(w.finished for w in windows))


def masked_by_length(tallies: Tallies) -> dict[str, float]:
    """Share of the sampled tokens that the age bound masked, by decile of the trained trajectories' length: `d1` holds
    the shortest tenth, `d10` the longest.  Empty below ten trajectories."""
    if len(tallies.lengths) < 10:
        return {}
    lengths, too_old = (np.frombuffer(column, np.uint32) for column in (tallies.lengths, tallies.too_old))
    order = np.argsort(lengths, kind="stable")
    deciles = zip(np.array_split(lengths[order], 10), np.array_split(too_old[order], 10), strict=True)
    return {
        f"d{i}": round(float(masked.sum() / max(1, sampled.sum())), 6) for i, (sampled, masked) in enumerate(deciles, 1)
    }


def _length_bias(tallies: Tallies, ledger: Ledger) -> float:
    """Mean sampled length of the trained trajectories over that of all that ended before the run did.  Below 1, what
    is trained on is shorter than what was dispatched."""
    dropped = sum(n for reason, n in ledger.dropped.items() if reason != "run_end")
    dropped_tokens = sum(n for reason, n in ledger.dropped_tokens.items() if reason != "run_end")
    trained, tokens = len(tallies.lengths), sum(tallies.lengths)
    return _share(_share(tokens, trained), _share(tokens + dropped_tokens, trained + dropped))


def _age_quantile(tallies: Tallies, q: float) -> float:
    """Nearest rank; exact, as ages are small integers."""
    rest = q * tallies.ages.total()
    for age in sorted(tallies.ages):
        rest -= tallies.ages[age]
        if rest <= 0:
            return age
    return math.nan


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
