"""Publisher, engines and learner are killed and started again at any point: all engines still get to the newest
version, nothing of the dead is mistaken for the living, and nobody waits for who is gone."""

import dataclasses

import pytest
from delivery_builders import ENGINES, Engine, World, play
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weights_builders import FIRST, bits_of, commit, hash_of, make_chain, make_live, make_tensors, same_bits, take

from engines.sglang.queue_conversation import RefusedForGood
from engines.weights.chain import Chain
from stream_rl.errors import WeightsError
from stream_rl.messages import (
    Alive,
    CommitOrder,
    EngineHello,
    EngineVerified,
    HashOrder,
    HashReport,
    Live,
    Refused,
    Staged,
    UpdatePart,
    VersionReport,
)
from stream_rl.types import Version

LIGHT = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None)
KILLS = ["restart", "restart_publisher", "restart_publisher", "fork", "stale", "take", "beat", "greet"]


@LIGHT
@given(st.data(), st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(0, 3), st.sampled_from([10, 40, 10_000]))
def test_whoever_is_killed_whenever_every_engine_reaches_the_newest_version_and_is_verified(
    data: st.DataObject, seed: int, verify_every: int, keep: int, part_bytes: int
) -> None:
    world = World(seed, verify_every, keep, part_bytes)
    play(world, data, KILLS)
    world.assert_all_newest()
    assert all(report.hash_matches for report in world.reports if isinstance(report, VersionReport))
    world.finish()
    world.assert_all_newest()
    for i in range(ENGINES):
        last = world.of(EngineVerified, i)[-1]
        assert (last.version, last.weights_hash) == (world.newest, hash_of(world.line[-1]))


def test_the_property_above_can_fail() -> None:
    """An engine that keeps what a dead publisher had staged, and a publisher that numbers its updates alike."""
    world = staged_for_a_dead_publisher()
    world.engines[0].live.forget_staged = lambda: None  # type: ignore[method-assign]
    world.incarnation = -1
    world.restart_publisher(heard=9)
    world.settle([0])
    assert world.engines[0].live.version == FIRST, "it thinks that it has told the new publisher what it told the old"


def staged_for_a_dead_publisher() -> World:
    """The first engine has staged an update and said so; nobody has read that yet."""
    world = World(part_bytes=1 << 20)
    world.settle()
    world.advance()
    world.engines[0].step()
    assert world.engines[0].live.staged == world.newest
    return world


def until(world: World, kind: type[object]) -> Engine:
    """The first engine, once it is about to handle a message of this kind."""
    engine = world.engines[0]
    for _ in range(50):
        if engine.inbox and isinstance(engine.inbox[0], kind):
            return engine
        engine.step()
        world.publisher_step(0)
    raise AssertionError(f"the engine never got a {kind.__name__}")


def test_engines_that_hold_the_newest_version_need_nothing_from_a_new_publisher() -> None:
    world = World(part_bytes=1 << 20)
    world.settle()
    world.advance()
    world.settle()
    for engine in world.engines:
        engine.received.clear()
    world.restart_publisher()
    world.settle()
    assert [engine.count(UpdatePart) for engine in world.engines] == [0, 0]
    world.advance()
    world.settle()
    world.assert_all_newest()
    assert not any(part.anchor for part in world.engines[0].received if isinstance(part, UpdatePart))


def test_engines_behind_the_version_that_a_new_publisher_begins_with_get_an_anchor() -> None:
    world = World()
    world.settle()
    world.advance()
    world.restart_publisher()
    for engine in world.engines:
        engine.inbox.clear()
    world.settle()
    world.assert_all_newest()
    assert [report.anchor for report in world.of(VersionReport)] == [True]


def test_a_new_publisher_that_knows_no_version_yet_tells_nobody_anything() -> None:
    world = World()
    world.settle()
    world.chain = Chain("r", 40, 3)
    world.delivery = world.new_delivery()
    for engine in world.engines:
        engine.beat()
        engine.greet()
    world.settle()
    assert not any(engine.count(UpdatePart) + engine.count(HashOrder) for engine in world.engines)
    world.chain.advance(world.newest, bits_of(world.line[-1]))
    world.route(world.delivery.advance(), None, "")
    world.settle()
    world.assert_all_newest()


def test_an_update_that_was_half_staged_when_its_publisher_died_is_discarded() -> None:
    world = World(part_bytes=10)
    world.settle()
    world.advance(1.0)
    engine = world.engines[0]
    for _ in range(2):
        engine.step()
    engine.inbox.clear()
    world.restart_publisher()
    world.advance(1.0)
    world.settle()
    world.assert_all_newest()


def test_a_new_publishers_first_update_is_no_repetition_of_the_old_ones_first() -> None:
    """Both are attempt 1, maybe of the same version: the old one's was staged and nobody alive was told."""
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
    engine.take()
    assert engine.ordered == world.newest and engine.live.version == FIRST
    engine.received.clear()
    world.restart_publisher()
    for _ in range(3):  # the scheduler takes its time: no hello with weights that are about to change
        engine.beat()
        world.publisher_step(0)
        while engine.inbox:
            engine.take()
    assert not any(isinstance(message, EngineHello) for message in engine.outbox)
    engine.step()
    assert engine.live.version == world.newest
    assert [type(m) for m in engine.outbox if not isinstance(m, Alive)] == [Live, EngineHello]
    world.settle()
    world.assert_all_newest()
    assert engine.count(UpdatePart) == 0, "it holds the new publisher's version already"


def test_nothing_is_staged_or_hashed_while_a_commit_is_on_its_way_through_the_scheduler() -> None:
    world = World(part_bytes=1 << 20)
    world.settle()
    world.advance()
    engine = until(world, CommitOrder)
    engine.take()
    anchor = [dataclasses.replace(part, attempt=7) for part in world.chain.anchor().parts]
    engine.inbox.extend([*anchor, HashOrder(version=world.newest)])
    engine.outbox.clear()
    while engine.inbox:
        engine.take()
    assert engine.live.staged == world.newest and not engine.outbox
    engine.step()
    assert [type(message) for message in engine.outbox] == [Live, Staged, HashReport]
    assert engine.outbox[0].problem == "" and engine.outbox[2].weights_hash == hash_of(world.line[-1])


def test_what_is_left_of_an_abandoned_update_does_not_hold_up_a_hash() -> None:
    world = staged_for_a_dead_publisher()
    engine = world.engines[0]
    engine.outbox.clear()
    engine.inbox.append(HashOrder(version=FIRST))
    engine.step()
    [report] = engine.outbox
    assert (report.version, report.weights_hash) == (FIRST, hash_of(world.line[0])) and engine.live.staged is None


def test_many_unknown_engine_answers_are_one_hello() -> None:
    world = World()
    world.settle()
    engine = world.engines[0]
    for _ in range(20):
        engine.beat()
    world.restart_publisher()
    world.engines = [engine]
    while engine.outbox:
        world.publisher_step(0)
    engine.inbox.extend(list(engine.inbox))
    while engine.inbox:
        engine.step()
    assert [type(message) for message in engine.outbox if not isinstance(message, Alive)] == [EngineHello]
    engine.outbox.clear()  # and if that one is lost, the next sign of life brings another
    engine.beat()
    world.publisher_step(0)
    engine.step()
    assert any(isinstance(message, EngineHello) for message in engine.outbox)


def test_an_engine_that_a_publisher_refuses_for_good_ends() -> None:
    world = World()
    world.settle()
    old = world.engines[0]
    world.restart(0)
    world.settle()
    old.outbox.clear()
    old.greet()
    for message in old.outbox:
        world.hear(old.peer, message)
    [fenced] = [refused for refused in world.refused if refused.reason == "fenced"]
    with pytest.raises(RefusedForGood, match=r"fenced.*has restarted since"):
        old.conversation.handle(fenced, old.now)
    world.engines[0].conversation.handle(Refused(reason="bad_rank", detail=""), 0.0)


# -- silence -----------------------------------------------------------------------------------------------------------


def test_an_engine_that_is_silent_for_too_long_is_forgotten_and_comes_back_by_itself() -> None:
    world = World(silence_seconds=30.0)
    world.settle()
    for _ in range(20):
        world.now += 2.0
        world.engines[1].beat()
        world.publisher_step(1)
    world.advance()
    assert not any(isinstance(message, UpdatePart) for message in world.engines[0].inbox)
    world.settle([1])
    world.finish([1])
    assert [report.engine for report in world.delivery.final_reports.values()] == ["engine-1"]
    world.settle()  # it was only stopped, and goes on
    world.assert_all_newest()
    assert sorted(world.delivery.final_reports) == ["engine-0", "engine-1"]


def test_any_message_is_a_sign_of_life_and_none_of_another_engine_is() -> None:
    world = World(silence_seconds=30.0, part_bytes=1 << 20)
    world.settle()
    world.now = 29.0
    world.advance()
    world.engines[0].step()
    world.publisher_step(0)
    world.now = 31.0
    world.engines[1].inbox.clear()
    world.hear(world.engines[0].peer, Alive())
    world.advance()
    assert not world.engines[1].inbox
    world.settle()
    world.assert_all_newest()


# -- histories ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [0, 1, 3])
def test_a_new_history_reaches_every_engine_as_an_anchor_also_at_a_lower_step(back: int) -> None:
    world = World(keep=8)
    world.settle()
    for _ in range(3):
        world.advance()
        world.settle()
    world.fork(back)
    assert world.newest == Version(1, 3 - back)
    world.settle()
    world.assert_all_newest()
    assert [report.anchor for report in world.of(VersionReport)] == [False, False, False, True]
    world.advance()
    world.settle()
    world.assert_all_newest()
    assert not world.of(VersionReport)[-1].anchor


def test_an_engine_takes_nothing_of_a_history_that_has_ended() -> None:
    line = [make_tensors(seed) for seed in range(3)]
    live, model = make_live(line[0], Version(0, 9))
    newer, older = make_chain(line[1], version=Version(1, 2)), make_chain(line[2], version=Version(0, 10))
    assert take(live, newer.anchor().parts) == Version(1, 2)
    commit(live, Version(1, 2))
    assert same_bits(model.live(), line[1])
    for part in older.anchor().parts:
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
    for engine in world.engines:
        engine.received.clear()
    world.settle()
    assert all(engine.live.version == newest and not engine.count(UpdatePart) for engine in world.engines)
    world.line.append(tensors)
    world.publish(Version(newest.history, newest.step + 1))
    world.settle()
    world.assert_all_newest()


# -- the end -----------------------------------------------------------------------------------------------------------


def test_a_final_version_that_is_said_again_is_not_verified_again() -> None:
    world = World()
    world.settle()
    world.finish()
    reports = dict(world.delivery.final_reports)
    assert sorted(reports) == ["engine-0", "engine-1"]
    assert world.delivery.finish(world.newest) == []
    world.settle()
    assert len(world.of(EngineVerified)) == 1 and world.delivery.final_reports == reports


def test_an_engine_that_is_restarted_after_the_end_is_brought_up_and_verified() -> None:
    world = World()
    world.settle()
    world.advance()
    world.settle()
    world.finish()
    world.restart(0)
    world.settle()
    world.assert_all_newest()
    assert [report.version for report in world.of(EngineVerified)] == [world.newest] * 2
