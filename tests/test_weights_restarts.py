"""Publisher, engines and learner are killed and started again at any point: all engines still get to the newest
version, nothing of the dead is mistaken for the living, and nobody waits for who is gone."""

import itertools

import pytest
from delivery_builders import ENGINES, FAULTS, World, play
from engine_builders import Engine, Rank
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from update_builders import anchor_parts, make_chain
from weights_builders import FIRST, RUN, commit, hash_of, make_live, make_tensors, same_bits, take

from engines.sglang.queue_conversation import RefusedForGood
from engines.weights.chain import Chain
from engines.weights.parts import numbered
from stream_rl.errors import WeightsError
from stream_rl.messages import (
    Alive,
    CommitOrder,
    EngineHello,
    EngineVerified,
    HashOrder,
    HashReport,
    Live,
    PartTaken,
    Refused,
    UpdatePart,
    VersionReport,
)
from stream_rl.types import Version

LIGHT = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
KILLS = ["restart", "restart_publisher", "restart_publisher", "fork", "stale", "take", "beat", "greet"]


@LIGHT
@given(
    st.data(), st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(0, 3), st.sampled_from([10, 40, 10_000]),
    st.integers(1, 2), st.booleans(),
)  # fmt: skip
def test_whoever_is_killed_whenever_every_engine_reaches_the_newest_version_and_is_verified(
    data: st.DataObject, seed: int, verify_every: int, keep: int, part_bytes: int, ranks: int, faults: bool
) -> None:
    world = World(seed, verify_every, keep, part_bytes, ranks=ranks)
    play(world, data, KILLS + FAULTS * faults)
    world.assert_all_newest()
    world.finish()
    world.assert_all_newest()
    for i in range(ENGINES):
        last = world.of(EngineVerified, i)[-1]
        assert (last.version, last.weights_hash) == (world.newest, hash_of(world.line[-1]))


@LIGHT
@given(st.data(), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_every_report_of_an_engine_of_one_rank_has_the_right_hash_whoever_is_killed(
    data: st.DataObject, seed: int, verify_every: int
) -> None:
    """Of several ranks, one that lost its conversation may be asked to commit what it has forgotten, and says so."""
    world = World(seed, verify_every)
    play(world, data, KILLS + FAULTS)
    assert all(report.hash_matches for report in world.reports if isinstance(report, VersionReport))
    assert all(report.weights_hash == report.expected for report in world.reports if isinstance(report, EngineVerified))


def test_the_property_above_can_fail() -> None:
    """Publishers that number their updates alike, and an answer to the old one's first that comes late."""
    for alike in (True, False):
        world = World(part_bytes=1 << 20)
        world.settle()
        world.advance()
        rank = world.engines[0].first
        while not any(isinstance(message, Live) for message in rank.outbox):
            world.engines[0].step()
            if not any(isinstance(message, Live) for message in rank.outbox):
                world.publisher_step(0)
        late = [message for message in rank.outbox if isinstance(message, Live)]
        world.restart(0)
        world.engines[0] = Engine("engine-0", 1, world.line[0])
        world.restart_publisher()
        if alike:
            world.delivery._attempts = itertools.count(1)
        while not world.engines[0].first.inbox:
            world.engines[0].first.greet()
            world.publisher_step(0)
        for message in late:
            world.delivery.handle(rank.peer, message)
        believed = world.delivery._engines["engine-0"].held
        assert (believed == world.newest) == alike
        assert world.engines[0].first.live.version == FIRST


def staged_for_a_dead_publisher() -> World:
    """The first engine has staged an update and said so; nobody has read that yet."""
    world = World(part_bytes=1 << 20)
    world.settle()
    world.advance()
    world.engines[0].step()
    assert staged(world.engines[0].first) == world.newest
    return world


def staged(rank: Rank) -> Version | None:
    return rank.live.staged and rank.live.staged[0]


def until(world: World, kind: type[object]) -> Engine:
    """The first engine, once it is about to handle a message of this kind."""
    engine = world.engines[0]
    for _ in range(50):
        if engine.first.inbox and isinstance(engine.first.inbox[0], kind):
            return engine
        engine.step()
        world.publisher_step(0)
    raise AssertionError(f"the engine never got a {kind.__name__}")


def test_engines_that_hold_the_newest_version_need_nothing_from_a_new_publisher() -> None:
    world = World(part_bytes=1 << 20)
    world.settle()
    world.advance()
    world.settle()
    for rank in world.all_ranks():
        rank.received.clear()
    world.restart_publisher()
    world.settle()
    assert [rank.count(UpdatePart) for rank in world.all_ranks()] == [0, 0]
    world.advance()
    world.settle()
    world.assert_all_newest()
    assert not any(part.anchor for part in world.engines[0].first.received if isinstance(part, UpdatePart))


def test_engines_behind_the_version_that_a_new_publisher_begins_with_get_an_anchor() -> None:
    world = World()
    world.settle()
    world.advance()
    world.restart_publisher()
    for rank in world.all_ranks():
        rank.inbox.clear()
    world.settle()
    world.assert_all_newest()
    assert [report.anchor for report in world.of(VersionReport)] == [True]


def test_a_new_publisher_that_knows_no_version_yet_tells_nobody_anything() -> None:
    world = World()
    world.settle()
    world.chain = Chain(RUN, 40, 3)
    world.delivery = world.new_delivery()
    for rank in world.all_ranks():
        rank.beat()
        rank.greet()
    world.settle()
    assert not any(rank.count(UpdatePart) + rank.count(HashOrder) for rank in world.all_ranks())
    world.chain.advance(anchor_parts(world.line[-1], world.newest))
    world.tell()
    world.settle()
    world.assert_all_newest()


def test_an_update_that_was_half_staged_when_its_publisher_died_is_discarded() -> None:
    world = World(part_bytes=10)
    world.settle()
    world.advance(1.0)
    engine = world.engines[0]
    for _ in range(2):
        engine.step()
    engine.first.inbox.clear()
    world.restart_publisher()
    world.advance(1.0)
    world.settle()
    world.assert_all_newest()


def test_a_new_publishers_first_update_is_no_repetition_of_the_old_ones_first() -> None:
    """Maybe both are of the same version: the old one's was staged and nobody alive was told."""
    for same in (True, False):
        world = staged_for_a_dead_publisher()
        world.restart_publisher(heard=9)
        if not same:
            world.advance()
        world.settle()
        world.assert_all_newest()


def test_what_a_dead_publisher_ordered_becomes_live_and_the_new_one_is_told() -> None:
    world = World(part_bytes=1 << 20)
    world.settle()
    world.advance()
    engine = until(world, CommitOrder)
    rank = engine.first
    rank.take()
    assert engine.ordered is not None and engine.ordered[0] == world.newest and rank.live.version == FIRST
    rank.received.clear()
    world.restart_publisher()
    for _ in range(3):  # the scheduler takes its time: no hello with weights that are about to change
        rank.beat()
        world.publisher_step(0)
        while rank.inbox:
            rank.take()
    assert not any(isinstance(message, EngineHello) for message in rank.outbox)
    engine.step()
    engine.step()
    assert rank.live.version == world.newest
    assert [type(m) for m in rank.outbox if not isinstance(m, Alive)] == [Live, EngineHello]
    world.settle()
    world.assert_all_newest()
    assert rank.count(UpdatePart) == 0, "it holds the new publisher's version already"


def test_nothing_is_staged_or_hashed_while_a_commit_is_on_its_way_through_the_scheduler() -> None:
    world = World(part_bytes=1 << 20)
    world.settle()
    world.advance()
    engine = until(world, CommitOrder)
    rank = engine.first
    rank.take()
    rank.inbox.extend(numbered(part, 7) for part in world.chain.prepare(None).parts)
    rank.inbox.append(HashOrder(version=world.newest))
    rank.outbox.clear()
    while rank.inbox:
        rank.take()
    assert staged(rank) == world.newest and not rank.outbox
    engine.step()
    engine.step()
    assert [type(message) for message in rank.outbox] == [Live, PartTaken, HashReport]
    assert rank.outbox[0].problem == "" and rank.outbox[2].weights_hash == hash_of(world.line[-1])


def test_what_is_left_of_an_abandoned_update_does_not_hold_up_a_hash() -> None:
    world = staged_for_a_dead_publisher()
    rank = world.engines[0].first
    rank.outbox.clear()
    rank.inbox.append(HashOrder(version=FIRST))
    rank.step()
    [report] = rank.outbox
    assert (report.version, report.weights_hash) == (FIRST, hash_of(world.line[0])) and rank.live.staged is None


def test_many_unknown_engine_answers_are_one_hello() -> None:
    world = World()
    world.settle()
    rank = world.engines[0].first
    for _ in range(20):
        rank.beat()
    world.restart_publisher()
    while rank.outbox:
        world.publisher_step(0)
    rank.inbox.extend(list(rank.inbox))
    while rank.inbox:
        rank.step()
    assert [type(message) for message in rank.outbox if not isinstance(message, Alive)] == [EngineHello]
    rank.outbox.clear()  # and if that one is lost, the next sign of life brings another
    rank.beat()
    world.publisher_step(0)
    rank.step()
    assert any(isinstance(message, EngineHello) for message in rank.outbox)


def test_an_engine_that_a_publisher_refuses_for_good_ends() -> None:
    world = World()
    world.settle()
    old = world.engines[0].first
    world.restart(0)
    world.settle()
    old.outbox.clear()
    old.greet()
    for message in old.outbox:
        world.hear(old.peer, message)
    [fenced] = [refused for refused in world.refused if refused.reason == "fenced"]
    with pytest.raises(RefusedForGood, match=r"fenced.*has restarted since"):
        old.conversation.handle(fenced, old.now)
    world.engines[0].first.conversation.handle(Refused(reason="bad_rank", detail=""), 0.0)


@pytest.mark.parametrize("keep", [0, 3])
@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_hello_that_comes_again_in_the_middle_of_an_update_does_not_shut_an_engine_out(
    keep: int, meanwhile: bool
) -> None:
    for steps in range(0, 40, 3):
        world = World(keep=keep)
        world.settle()
        world.advance()
        engine = world.engines[0]
        for _ in range(steps):
            engine.step()
            if steps % 2:
                world.publisher_step(0)
        if meanwhile:
            world.advance()
        engine.first.greet()
        world.settle()
        world.advance()
        world.settle()
        world.assert_all_newest()


# -- silence -----------------------------------------------------------------------------------------------------------


def test_an_engine_that_is_silent_for_too_long_is_forgotten_and_comes_back_by_itself() -> None:
    world = World(silence_seconds=30.0)
    world.settle()
    for _ in range(20):
        world.now += 2.0
        world.engines[1].first.beat()
        world.publisher_step(1)
    world.advance()
    assert not any(isinstance(message, UpdatePart) for message in world.engines[0].first.inbox)
    world.settle([1])
    world.finish([1])
    assert [report.engine for report in world.delivery.final_reports.values()] == ["engine-1"]
    world.settle()  # it was only stopped, and goes on
    world.assert_all_newest()
    assert sorted(world.delivery.final_reports) == ["engine-0", "engine-1"]


def test_any_message_is_a_sign_of_life_and_none_of_another_engine_is() -> None:
    world = World(silence_seconds=30.0, part_bytes=1 << 20)
    world.settle()
    world.now += 29.0
    world.advance()
    world.engines[0].step()
    world.publisher_step(0)
    world.now += 3.0
    world.engines[1].first.inbox.clear()
    world.hear(world.engines[0].first.peer, Alive())
    world.advance()
    assert not world.engines[1].first.inbox
    world.settle()
    world.assert_all_newest()


# -- histories ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [0, 1, 3])
def test_a_new_history_reaches_every_engine_by_what_differs_also_at_a_lower_step(back: int) -> None:
    world = World(keep=8)
    world.settle()
    for _ in range(3):
        world.advance(0.02)
        world.settle()
    world.fork(back)
    assert world.newest == Version(1, 3 - back)
    world.settle()
    world.assert_all_newest()
    world.advance(0.02)
    world.settle()
    world.assert_all_newest()
    assert [report.anchor for report in world.of(VersionReport)] == [False] * 5


def test_a_new_history_reaches_who_is_unknown_to_its_publisher_as_an_anchor() -> None:
    world = World(keep=8)
    world.settle()
    world.advance(0.02)
    world.settle()
    world.newest = Version(1, 0)
    world.restart_publisher()
    world.settle()
    world.assert_all_newest()
    assert [report.anchor for report in world.of(VersionReport)] == [False, True]


def test_an_engine_takes_nothing_of_a_history_that_has_ended() -> None:
    line = [make_tensors(seed) for seed in range(3)]
    live, model = make_live(line[0], Version(0, 9))
    newer, older = make_chain(line[1], version=Version(1, 2)), make_chain(line[2], version=Version(0, 10))
    assert take(live, newer.prepare(None).parts) == Version(1, 2)
    commit(live, Version(1, 2))
    assert same_bits(model.live(), line[1])
    for part in older.prepare(None).parts:
        with pytest.raises(WeightsError, match=r"0\.10 is of a line of training that has ended.* holds 1\.2"):
            live.receive(part)
    assert live.version == Version(1, 2) and live.staged is None and same_bits(model.live(), line[1])


def test_a_publisher_with_a_dead_learners_version_leaves_engines_alone_that_are_ahead_of_it() -> None:
    """It was restarted, and the first to offer it a version was a learner that another one has taken the place of."""
    world = World()
    world.settle()
    world.fork(0)
    world.settle()
    newest, tensors = world.newest, world.line[-1]
    world.chain = make_chain(make_tensors(99), version=Version(0, 50))
    world.delivery = world.new_delivery()
    for rank in world.all_ranks():
        rank.received.clear()
    world.settle()
    assert all(rank.live.version == newest and not rank.count(UpdatePart) for rank in world.all_ranks())
    world.line.append(tensors)
    world.newest = Version(newest.history, newest.step + 1)
    world.chain.advance(anchor_parts(tensors, world.newest))
    world.tell()
    world.settle()
    world.assert_all_newest()
