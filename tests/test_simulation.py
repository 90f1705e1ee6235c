"""The simulated world behaves as it says, leaves the queue's books right, and shows what it is there to show."""

import dataclasses
import functools
import json
import math
import pathlib
import sqlite3
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from queues.admission import LEAST_OCCUPANCY, Admission
from queues.core import JOURNAL, QueueCore
from queues.journal import Journal
from scripts.simulation.claims import claims
from scripts.simulation.cli import simulate
from scripts.simulation.clock import Clock
from scripts.simulation.engine import Engine, Request, _spans
from scripts.simulation.lengths import Episode, make, recorded
from scripts.simulation.outcome import Outcome, outcome
from scripts.simulation.policies import choose, policies
from scripts.simulation.replay import ReplayDiffers, replay
from scripts.simulation.report import write
from scripts.simulation.setting import Setting, setting
from scripts.simulation.world import RUN, World
from stream_rl import messages as m
from stream_rl import wire
from stream_rl.errors import ConfigError
from stream_rl.types import Finish, Version, make_rid


def small(**changes: Any) -> Setting:
    """A twentieth of the work of the default setting, in the same proportions."""
    sizes: dict[str, Any] = {"groups": 8, "group_size": 4, "mean_tokens": 128.0, "chunk_tokens": 8, "steps": 100}
    engines = {"slots": 24, "step_request_s": 0.03 / 24}
    return dataclasses.replace(Setting(), **(sizes | engines | changes))


@functools.cache
def world(policy: str, **changes: Any) -> World:
    """A world after its run."""
    chosen = small(**changes)
    made = World(chosen, policies(chosen)[policy], make(chosen))
    made.run()
    return made


def result(policy: str, **changes: Any) -> Outcome:
    return outcome(world(policy, **changes))


def trained(made: World) -> list[tuple[int, int, int, int]]:
    """(group, member, sampled, trained) in order."""
    return [
        row
        for step in made.learner.steps
        for row in zip(
            *(column.tolist() for column in (step.groups, step.members, step.sampled, step.trained)), strict=True
        )
    ]


EVERY = sorted(policies(small()).keys() - {"fixed_1", "fixed_1.5"})

# -- the world is what it says ---------------------------------------------------------------------------------


class Lone:
    """One engine with nobody around it."""

    def __init__(self, **changes: Any) -> None:
        self.setting, self.clock = small(**changes), Clock()
        self.said: list[Any] = []
        self.ended: list[tuple[str, str]] = []
        self.engine = Engine("engine-0", RUN, self.setting, self.clock, self.said.append)

    def submit(self, number: int, episode: Episode, done: int = 0) -> str:
        rid = make_rid(RUN, number, 0, 0)
        self.engine.submit(Request(rid, number, 0, 0, episode, done, done, self._ended))
        return rid

    def _ended(self, request: Request, finish: Finish) -> None:
        self.ended.append((request.rid, finish))

    def until(self, seconds: float) -> None:
        self.clock.after(seconds, lambda: None)
        end = self.clock.now + seconds
        self.clock.run(until=lambda: self.clock.now >= end)

    @property
    def chunks(self) -> list[m.Chunks]:
        return [message for message in self.said if isinstance(message, m.Chunks)]


@pytest.mark.parametrize("requests", [1, 7, 24, 60])
def test_an_engine_is_as_fast_as_its_model_says(requests: int) -> None:
    lone = Lone()
    for number in range(requests):
        lone.submit(number, Episode(1 << 20))
    lone.until(100.0)
    running = min(requests, lone.setting.slots)
    expected = running / (lone.setting.step_s + running * lone.setting.step_request_s)
    assert lone.engine.generated / 100 == pytest.approx(expected, rel=0.02)


def test_an_engines_stream_is_whole_and_ends_where_the_episode_does() -> None:
    lone = Lone()
    rids = [lone.submit(number, Episode(tokens)) for number, tokens in enumerate([1, 8, 9, 40, 100])]
    lone.until(20.0)
    received = dict.fromkeys(rids, 0)
    assert [chunks.sequence for chunks in lone.chunks] == list(range(len(lone.chunks)))
    for chunks in lone.chunks:
        for rid, start, count in zip(chunks.rids, chunks.starts.tolist(), chunks.counts.tolist(), strict=True):
            assert start == received[rid]
            received[rid] += count
        assert len(chunks.token_ids) == chunks.counts.sum() == chunks.spans[:, 3].sum()
    assert list(received.values()) == [1, 8, 9, 40, 100]
    assert sorted(lone.ended) == [(rid, "stop") for rid in rids]


def test_an_environment_takes_its_time_and_no_slot() -> None:
    lone = Lone(slots=1)
    lone.submit(0, Episode(16, waits=((8, 50.0),)))
    lone.submit(1, Episode(8))
    lone.until(40.0)
    assert lone.ended == [(make_rid(RUN, 1, 0, 0), "stop")]
    lone.until(20.0)
    assert len(lone.ended) == 2


def test_while_environments_think_others_keep_the_engines_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trajectory that waits is in no engine, so more of them are grown for the same engines."""
    quick = {"learner_speed": 4.0, "max_token_age": -1, "steps": 60}  # a learner that is never the slower side
    busy = result("fixed_3", lengths="turns:0.01", **quick).engine_use
    assert result("fixed_3", lengths="turns:0.7", **quick).engine_use > 0.85 * busy
    monkeypatch.setattr(Admission, "turn", lambda admission, ran_s, waited_s: None)
    assert result("fixed_3", lengths="turns:0.7", seed=1, **quick).engine_use < 0.7 * busy


def test_turns_are_segments_and_what_environments_say_is_never_trained() -> None:
    made = world("steered", lengths="turns:0.5")
    tallies = made.core.tallies
    assert tallies.appended_tokens > 6 * len(tallies.lengths)
    assert tallies.turns > tallies.appended_tokens
    assert all(sampled == made.actor.members[group, n].episode.tokens for group, n, sampled, _ in trained(made))
    assert LEAST_OCCUPANCY < made.core.store.admission.occupancy < 0.8


def test_an_abort_says_how_far_it_came_once() -> None:
    lone = Lone()
    rid = lone.submit(0, Episode(1000))
    lone.until(1.0)
    lone.engine.abort(rid)
    lone.engine.abort(rid)
    lone.until(1.0)
    assert lone.ended == [(rid, "abort")]
    assert lone.chunks[-1].finishes == ["abort"]
    assert lone.chunks[-1].starts.tolist() == [sum(int(chunks.counts[0]) for chunks in lone.chunks[:-1])]


def test_new_weights_are_live_between_two_steps_of_a_round() -> None:
    a, b, c = Version(0, 3), Version(0, 4), Version(0, 5)
    spans = _spans([16, 4, 5, 0], [(0, a), (5, b), (12, c)])
    assert spans.tolist() == [[0, 0, 3, 5], [0, 0, 4, 7], [0, 0, 5, 4], [1, 0, 3, 4], [2, 0, 3, 5]]
    assert _spans([3], [(0, a), (0, b)]).tolist() == [[0, 0, 4, 3]]


def test_the_same_seed_gives_the_same_run_and_another_another() -> None:
    chosen = small(steps=30)
    runs = []
    for seed in (0, 0, 1):
        made = World(dataclasses.replace(chosen, seed=seed), policies(chosen)["steered"], make(chosen))
        made.run()
        runs.append((made.clock.now, trained(made)))
    assert runs[0] == runs[1] != runs[2]


def test_all_policies_meet_the_same_episodes() -> None:
    one, other = world("synchronous").actor.members, world("steered").actor.members
    both = one.keys() & other.keys()
    assert len(both) > 1000
    assert all(one[key].episode == other[key].episode for key in both)


@pytest.mark.parametrize("policy", EVERY)
def test_the_queues_books_balance_under_every_policy(policy: str) -> None:
    made = world(policy)
    made.core.recount()
    assert not {reason for reason in made.core.tallies.refused if reason != "after_drop"}
    seen = trained(made)
    assert len({(group, member) for group, member, _, _ in seen}) == len(seen)
    assert all(tokens == made.actor.members[group, member].episode.tokens for group, member, tokens, _ in seen)


def test_batches_are_sampled_by_one_version() -> None:
    assert result("synchronous").age_max == 0
    one_off = result("one_step_off")
    assert (one_off.age_mean, one_off.age_max) == (1.0, 1)
    groups = {len(set(step.groups.tolist())) for step in world("one_step_off").learner.steps}
    assert groups == {small().groups}


def test_rounds_stop_what_grows_and_go_on_with_it() -> None:
    made = world("april_rounds")
    assert made.core.tallies.resumed["parked"] > 1000
    assert max(member.segment for member in made.actor.members.values()) > 3


@pytest.mark.parametrize("versions", [1, 10])
def test_an_agents_episode_spans_about_the_versions_that_it_is_to(versions: int) -> None:
    chosen = setting(f"agent:{versions}", steps=20 + 10 * versions, ratio=2.0 * versions)
    made = World(chosen, policies(chosen)["admission"], make(chosen))
    made.run()
    assert versions / 2 <= outcome(made).versions_spanned <= 2 * versions


class Shortening:
    """Trajectories that come to be a quarter as long, as a model learns to be brief."""

    def __init__(self, chosen: Setting) -> None:
        self._lengths, self._drawn, self._groups = make(chosen), 0, 40 * chosen.groups

    def draw(self, rng: np.random.Generator, members: int) -> list[Episode]:
        share = 0.25 ** min(1.0, self._drawn / self._groups)
        self._drawn += 1
        return [Episode(math.ceil(share * episode.tokens)) for episode in self._lengths.draw(rng, members)]


def test_answers_that_get_shorter_cost_no_throughput() -> None:
    chosen = small(learner_speed=2.0, steps=150)
    made = World(chosen, policies(chosen)["steered"], Shortening(chosen))
    made.run()
    constant = result("steered", learner_speed=2.0, steps=150)
    assert outcome(made).trained_tokens_per_s > 0.9 * constant.trained_tokens_per_s
    assert made.core.store.admission.groups_per_step > 3 * chosen.groups


# -- what it shows ---------------------------------------------------------------------------------------------


def test_dropping_or_stopping_stale_work_trains_on_short_trajectories() -> None:
    for policy in ("admission_drop", "admission_abort"):
        told = result(policy)
        assert told.age_max <= small().max_staleness
        assert told.length_bias < 0.7
        assert told.wasted_share > 0.4


def test_the_mask_holds_the_same_bound_and_lets_trajectories_be() -> None:
    told = result("streaming_mask")
    assert told.age_max == small().max_staleness
    assert told.dropped == 0
    assert told.length_bias > 0.9
    assert told.masked_by_decile[-1] > 0.2 > 0.1 > told.masked_by_decile[0]


def test_what_masks_nothing_shows_nothing_masked() -> None:
    told = result("admission")
    assert told.masked_share == told.wasted_share == sum(told.masked_by_decile) == 0
    assert told.length_bias == pytest.approx(1.0, abs=0.02)
    assert told.age_max > 2 * small().max_staleness


def test_past_the_knee_more_under_way_adds_age_and_no_throughput() -> None:
    """Where a slow learner makes the knee a sharp one."""
    at, past = (result(policy, learner_speed=0.5) for policy in ("fixed_4", "fixed_6"))
    assert past.trained_tokens_per_s < 1.02 * at.trained_tokens_per_s
    assert past.age_mean > 1.2 * at.age_mean
    below = result("fixed_2", learner_speed=0.5)
    assert below.trained_tokens_per_s < 0.9 * at.trained_tokens_per_s


@pytest.mark.parametrize("learner", [{}, {"learner_speed": 0.5}], ids=["balanced", "learner limits"])
def test_steering_itself_it_is_nearly_as_fast_as_the_best_ratio_and_no_older(learner: dict[str, float]) -> None:
    best = max((result(f"fixed_{n}", **learner) for n in (3, 4, 6)), key=lambda told: told.trained_tokens_per_s)
    steered = result("steered", **learner)
    assert steered.trained_tokens_per_s > 0.9 * best.trained_tokens_per_s
    assert steered.age_mean <= best.age_mean


def test_steering_itself_it_keeps_to_its_target() -> None:
    assert result("steered").age_mean > 1.7
    assert 1.0 < result("steered", target_token_age=1.3).age_mean < 1.1 * 1.3


def test_what_the_mask_takes_asks_for_no_more_groups() -> None:
    chosen = setting("agent:10", steps=40, ratio=20.0, max_token_age=6)
    made = World(chosen, policies(chosen)["fixed_20"], make(chosen))
    made.run()
    assert outcome(made).groups_under_way < 1.3 * 20


def test_claims_say_when_they_do_not_hold() -> None:
    chosen = small()
    told = {name: result(name) for name in ("admission_drop", "admission_abort", "streaming_mask", "steered_young")}
    told |= {f"fixed_{ratio:g}": result("fixed_2") for ratio in chosen.ratios} | {"steered": result("steered")}
    assert [claim.holds for claim in claims(chosen, told)] == [True, True, False, False, True]
    spoilt: dict[str, dict[str, Any]] = {
        "admission_drop": {"length_bias": 0.8},
        "streaming_mask": {"age_max": chosen.max_staleness + 1},
        "steered_young": {"age_mean": 3.0},
    }
    told |= {name: dataclasses.replace(told[name], **changes) for name, changes in spoilt.items()}
    assert not any(claim.holds for claim in claims(chosen, told))


# -- recorded runs ---------------------------------------------------------------------------------------------


class Recording(QueueCore):
    """A core that journals as the queue's process does."""

    journal: Journal

    def handle(self, now: float, sender: str, event: Any) -> list[tuple[str, Any]]:
        actions = super().handle(now, sender, event)
        if self.durable:
            name = type(event).__name__
            frames = [] if name == "Tick" else wire.encode(event)
            records = [message for recipient, message in actions if recipient == JOURNAL]
            self.journal.append(now, sender, name, frames, records)
        return actions


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a recorded run."""
    directory = tmp_path_factory.mktemp("run")
    chosen = small(steps=12)
    made = World(chosen, policies(chosen)["april_rounds"], make(chosen))
    made.core = core = Recording(made.core.settings)
    settings = dataclasses.asdict(core.settings)
    with Journal.open(directory / "journal.db", RUN, settings, fsync=False, keep=True) as core.journal:
        made.run()
        core.journal.commit()
    return directory


def altered(run: pathlib.Path, tmp_path: pathlib.Path, sql: str) -> pathlib.Path:
    path = tmp_path / "journal.db"
    path.write_bytes((run / "journal.db").read_bytes())
    with sqlite3.connect(path) as database:
        assert database.execute(sql).rowcount
    return path


def test_a_recorded_run_replays_to_the_same_batches(run: pathlib.Path) -> None:
    done = replay(run / "journal.db")
    assert done.steps == 12
    assert done.rows > 1000
    told = CliRunner().invoke(simulate, ["--replay", str(run)], catch_exceptions=False)
    assert told.exit_code == 0
    assert f"the same 12 batches of {done.trajectories} trajectories" in told.output


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("UPDATE steps SET members = replace(members, '[0,', '[3,') WHERE step = 5", "step 0.5: trajectory 0 of its"),
        ("UPDATE steps SET outcome = 'skipped' WHERE step = 3", "step 0.3 was skipped, the replay has it trained"),
        ("DELETE FROM steps WHERE step = 4", "the replay takes step 0.4, which was not recorded"),
        ("INSERT INTO steps VALUES (0, 99, 'trained', '[1]', '[0]')", "step 0.99 was recorded, the replay does not"),
        ("DELETE FROM events WHERE seq >= (SELECT max(seq) FROM events WHERE kind = 'Applied')", "step 0.11 was rec"),
    ],
)
def test_a_replay_that_differs_names_the_first_difference(
    run: pathlib.Path, tmp_path: pathlib.Path, sql: str, says: str
) -> None:
    with pytest.raises(ReplayDiffers, match=says):
        replay(altered(run, tmp_path, sql))


def test_a_journal_that_was_reclaimed_cannot_be_replayed(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"has no row 1: .*\.keep_journal = true"):
        replay(altered(run, tmp_path, "DELETE FROM events WHERE seq <= 40"))


def test_lengths_can_be_those_of_a_recorded_run(run: pathlib.Path) -> None:
    held = recorded(run)
    assert len(held) > 300
    drawn = make(small(lengths=f"recorded:{run}")).draw(np.random.default_rng(0), 4000)
    mean = sum(episode.tokens for episode in drawn) / len(drawn)
    assert mean == pytest.approx(small().mean_tokens, rel=0.1)
    assert len({episode.tokens for episode in drawn}) > 100


# -- the command -----------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_figures_and_a_plot(tmp_path: pathlib.Path) -> None:
    files = ["--json", str(tmp_path / "a/figures.json"), "--plot", str(tmp_path / "b/plot.png")]
    told = CliRunner().invoke(simulate, ["--policy", "steered", "--steps", "20", *files], catch_exceptions=False)
    assert told.exit_code == 0
    assert "steered" in told.output and "by length decile" in told.output
    runs = json.loads((tmp_path / "a/figures.json").read_text())["runs"]
    figures = runs["stream-rl simulate --policy steered --steps 20"]
    assert figures["setting"]["steps"] == 20
    assert len(figures["policies"]["steered"]["masked_by_decile"]) == 10
    assert (tmp_path / "b/plot.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_added_to_no_other_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "other.json").write_text('{"summary": 1}')
    with pytest.raises(ConfigError, match="holds no runs of simulate"):
        write(tmp_path / "other.json", "stream-rl simulate", small(), [], [])
    assert (tmp_path / "other.json").read_text() == '{"summary": 1}'


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ("lognormal:wide", "expected a positive number after the colon, got 'wide'"),
        ("lognormal:-1", "expected a positive number"),
        ("agent:0", "expected a positive number"),
        ("turns:1", "a share of the time below 1"),
        ("pareto:2", "lognormal:SIGMA, agent:VERSIONS, turns:SHARE or recorded:RUN, got 'pareto:2'"),
        ("recorded:/nowhere", "no journal /nowhere"),
    ],
)
def test_lengths_that_nobody_knows_are_refused(lengths: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(setting(lengths))


def test_a_policy_that_nobody_knows_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no policy 'fifo'; there are synchronous, .* and all"):
        choose(small(), "fifo")
