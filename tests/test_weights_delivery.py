"""Delivery against simulated engines that stage and commit with the real code: all get to the newest version."""

import dataclasses

import pytest
from delivery_builders import ENGINES, FAULTS, RETRY_SECONDS, World, play
from engine_builders import STALL_SECONDS, Engine, Rank
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from update_builders import anchor_parts
from weights_builders import FIRST, RUN, hash_of, make_tensors

from engines.weights.chain import Chain
from engines.weights.parts import checksum, numbered
from stream_rl.errors import WeightsError
from stream_rl.messages import (
    CommitOrder,
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


@LIGHT
@given(
    st.data(), st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(0, 3), st.sampled_from([10, 40, 10_000]),
    st.integers(1, 2),
)  # fmt: skip
def test_every_engine_reaches_the_newest_version_bit_for_bit_and_is_verified(
    data: st.DataObject, seed: int, verify_every: int, keep: int, part_bytes: int, ranks: int
) -> None:
    world = World(seed, verify_every, keep, part_bytes, ranks=ranks)
    play(world, data, ["restart", "stale", "corrupt"])
    assert_all_well(world)


@LIGHT
@given(
    st.data(), st.integers(0, 2**32 - 1), st.integers(0, 3), st.sampled_from([10, 40, 10_000]), st.integers(1, 4),
    st.integers(1, 2),
)  # fmt: skip
def test_what_is_lost_repeated_reordered_or_corrupted_on_the_way_changes_nothing(
    data: st.DataObject, seed: int, verify_every: int, part_bytes: int, parts_ahead: int, ranks: int
) -> None:
    world = World(seed, verify_every, part_bytes=part_bytes, parts_ahead=parts_ahead, ranks=ranks)
    play(world, data, ["restart", "stale", "beat", "greet", *FAULTS, *FAULTS])
    assert_all_well(world)


def assert_all_well(world: World) -> None:
    world.assert_all_newest()
    assert all(report.weights_hash == report.expected for report in world.reports if isinstance(report, EngineVerified))
    assert all(report.hash_matches for report in world.reports if isinstance(report, VersionReport))
    world.finish()
    world.assert_all_newest()
    for i in range(ENGINES):
        last = world.of(EngineVerified, i)[-1]
        assert (last.version, last.weights_hash, last.expected) == (
            world.newest,
            hash_of(world.line[-1]),
            last.weights_hash,
        )


@LIGHT
@given(st.data(), st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(1, 2))
def test_bits_that_flip_in_live_weights_are_found_and_repaired_by_the_final_verification(
    data: st.DataObject, seed: int, verify_every: int, ranks: int
) -> None:
    world = World(seed, verify_every, ranks=ranks)
    play(world, data, ["restart", "flip", "flip"])
    assert all(rank.live.version == world.newest for rank in world.all_ranks())
    world.finish()
    world.assert_all_newest()


def test_the_properties_above_can_fail() -> None:
    """A publisher that never says anything again, one that sends without credit, an engine that takes every part for
    whole, and one that says of whatever it holds that it is what was published."""
    world = World(part_bytes=10)
    world.settle()
    world.delivery.remind = list  # type: ignore[method-assign]
    world.advance()
    world.engines[0].first.inbox.clear()
    world.settle()
    assert world.engines[0].first.live.version == FIRST

    world = World(part_bytes=10)
    world.settle()
    world.parts_ahead = 2
    with pytest.raises(AssertionError, match="credit"):
        world.advance(1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engines.weights.parts.check", lambda part: None)
        world = World(ranks=2, seed=1)
        world.settle()
        world.advance(1.0)
        inbox = world.engines[0].ranks[1].inbox
        payload = inbox[0].payload.copy()
        payload[-1] ^= 1
        inbox[0] = dataclasses.replace(inbox[0], payload=payload)
        world.settle()
        assert not all(report.hash_matches for report in world.of(VersionReport))

    world = World()
    world.settle()
    world.flip(0)
    live = world.engines[0].first.live
    live.recompute = lambda: True  # type: ignore[method-assign]
    world.finish()
    with pytest.raises(AssertionError):
        world.assert_all_newest()


def test_a_version_costs_one_delta_one_order_and_one_report() -> None:
    world = World(part_bytes=1 << 20)
    world.settle()
    assert not any(rank.received for rank in world.all_ranks())
    world.advance(0.02)
    world.now += 1.0
    sent = world.now - 1.0
    world.settle([0])
    [part, order] = world.engines[0].first.received
    assert isinstance(part, UpdatePart) and not part.anchor and isinstance(order, CommitOrder)
    [report] = world.of(VersionReport)
    update = world.chain.prepared(FIRST)
    assert update is not None and part.payload.tobytes() == update.parts[0].payload.tobytes()
    assert (report.version, report.anchor, report.hash_matches) == (Version(0, 1), False, True)
    assert (report.update_bytes, report.changed, report.code) == (update.bytes, update.changed, "fast")
    assert (report.full_bytes, report.elements) == (world.chain.full_bytes, world.chain.elements)
    stage_seconds = world.engines[0].first.live.stage_seconds
    assert (report.commit_seconds, report.send_seconds) == (world.now - sent, world.now - sent)
    assert (report.stage_seconds, report.stall_seconds) == (stage_seconds, STALL_SECONDS)


@pytest.mark.parametrize("parts_ahead", [1, 3])
def test_a_rank_gets_another_part_for_each_that_it_has_taken(parts_ahead: int) -> None:
    world = World(part_bytes=10, parts_ahead=parts_ahead)
    world.settle()
    world.advance(1.0)
    rank, gone = world.engines[0].first, 0
    parts = rank.inbox[0].parts
    assert parts > 4
    while not any(isinstance(message, CommitOrder) for message in rank.inbox):
        assert [part.part for part in rank.inbox] == list(range(gone, min(parts, gone + parts_ahead)))
        rank.take()
        world.publisher_step(0)
        gone += 1
    assert gone == parts


def test_a_slow_engine_delays_nobody_and_what_waits_for_it_is_bounded() -> None:
    world = World(keep=3, part_bytes=10, parts_ahead=2)
    world.settle()
    for _ in range(10):
        world.advance(0.02)
        world.settle([1])
        assert world.engines[1].first.live.version == world.newest
    assert world.engines[0].first.live.version == FIRST
    assert len(world.engines[0].first.inbox) <= 2, "a part or two wait for the slow engine, not ten updates"
    assert [report.anchor for report in world.of(VersionReport, 1)] == [False] * 10
    world.settle()
    world.assert_all_newest()


@pytest.mark.parametrize(("lag", "share", "anchor"), [(2, 0.02, False), (3, 0.02, False), (9, 0.02, True)])
def test_who_lags_gets_one_composed_update_or_an_anchor_where_it_is_smaller_or_all_there_is(
    lag: int, share: float, anchor: bool
) -> None:
    world = World(keep=4)
    world.settle()
    world.advance(share)
    for _ in range(lag - 1):
        world.advance(share)
    world.settle()
    world.assert_all_newest()
    assert [(r.version.step, r.anchor) for r in world.of(VersionReport)] == [(1, False), (lag, anchor)]


def test_what_changed_all_over_is_not_sent_to_who_lags() -> None:
    world = World(keep=4)
    world.settle()
    for _ in range(3):
        world.advance(1.0)
    world.settle()
    world.assert_all_newest()
    assert [report.anchor for report in world.of(VersionReport)] == [False, True]


def test_nobody_waits_for_an_update_that_is_being_prepared_for_another() -> None:
    world = World()
    world.settle()
    world.advance(0.02)
    world.settle([1])
    world.advance(0.02)
    world.settle([1])
    world.restart(0)
    world.busy = True
    while world.engines[0].first.outbox:
        world.publisher_step(0)
    assert world.delivery.wanted == {FIRST} and not world.engines[0].first.inbox
    world.advance(0.02)
    for _ in range(20):
        world.engines[1].step()
        world.publisher_step(1)
    assert world.engines[1].first.live.version == world.newest and not world.engines[0].first.inbox
    world.settle()
    world.assert_all_newest()
    assert [(report.version, report.anchor) for report in world.of(VersionReport)] == [(world.newest, False)]


def test_a_restarted_engine_takes_the_place_of_its_old_incarnation_which_is_fenced() -> None:
    world = World()
    world.settle()
    world.advance()
    old = world.engines[0]
    while old.first.live.staged is None:
        old.step()
        if old.first.live.staged is None:
            world.publisher_step(0)
    world.restart(0)
    world.settle()
    world.assert_all_newest()
    while world.stale:
        world.hear(*world.stale.popleft())
    for message in (old.first.hello(), live_of(old.first, world.newest)):
        world.hear(old.first.peer, message)
    assert {refused.reason for refused in world.refused} == {"fenced", "unknown_engine"}
    world.advance()
    world.settle()
    world.assert_all_newest()


def live_of(rank: Rank, target: Version) -> Live:
    seconds = {"stage_seconds": 0.0, "stall_seconds": 0.0}
    return Live(target=target, attempt=1, weights_hash="0", replicas={}, **seconds, **rank.me)


def test_an_engine_that_cannot_be_reached_is_forgotten_until_it_says_hello_again() -> None:
    world = World()
    world.settle()
    world.delivery.unreachable(b"somebody")
    world.delivery.unreachable(world.engines[0].first.peer)
    world.advance()
    world.settle([1])
    assert world.engines[1].first.live.version == world.newest and not world.engines[0].first.inbox
    world.settle()  # its next sign of life brings the question who it is
    world.assert_all_newest()
    assert world.engines[0].first.count(Refused) == 1


def test_an_engine_of_another_run_or_one_that_never_said_hello_is_refused() -> None:
    world = World()
    rank = world.engines[0].first
    stranger = dataclasses.replace(rank.hello(), run="other", engine="engine-9")
    [(peer, refused)] = world.delivery.handle(b"x", stranger)
    assert (peer, refused.reason) == (b"x", "other_run") and "'r'" in refused.detail and "'other'" in refused.detail
    taken = PartTaken(engine="engine-9", incarnation=1, rank=0, attempt=1, part=0)
    [(_, refused)] = world.delivery.handle(b"x", taken)
    assert refused.reason == "unknown_engine"
    world.settle()
    [(_, refused)] = world.delivery.handle(b"x", dataclasses.replace(rank.hello(), incarnation=0))
    assert refused.reason == "fenced"


@pytest.mark.parametrize("hello_first", [True, False])
@pytest.mark.parametrize("version", [FIRST, Version(0, 9)])
def test_an_engine_that_does_not_hold_what_it_says_gets_an_anchor(hello_first: bool, version: Version) -> None:
    world = World()
    world.engines[1].first.outbox.clear()
    engine = world.engines[0] = Engine("engine-0", 1, make_tensors(99), version)
    rank = engine.first
    if hello_first:
        world.chain = Chain(RUN, 40, 3)
        world.delivery = world.new_delivery()
        assert world.delivery.handle(rank.peer, rank.hello()) == []
        world.chain.advance(anchor_parts(world.line[0]))
        world.tell()
    else:
        world.hear(rank.peer, rank.hello())
    rank.outbox.clear()
    assert rank.inbox and all(part.anchor for part in rank.inbox)
    world.settle([0])
    assert rank.live.version == FIRST and rank.holds(world.line[0])


# -- what goes wrong on the way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", [1, 5])
def test_a_part_that_arrives_corrupt_is_asked_for_again_and_costs_no_anchor(damaged: int) -> None:
    world = World(part_bytes=10, parts_ahead=5)
    world.settle()
    world.advance(1.0)
    inbox = world.engines[0].first.inbox
    for i in range(damaged):
        inbox[i] = dataclasses.replace(inbox[i], checksum=0)
    world.settle()
    world.assert_all_newest()
    assert [report.anchor for report in world.of(VersionReport)] == [False]


def test_a_part_whose_attempt_was_damaged_is_sent_again_and_takes_the_place_of_nothing() -> None:
    world = World(part_bytes=10)
    world.settle()
    world.advance(1.0)
    inbox = world.engines[0].first.inbox
    inbox[0] = dataclasses.replace(inbox[0], attempt=99)
    world.settle()
    world.assert_all_newest()


@pytest.mark.parametrize("gone", [UpdatePart, PartTaken, CommitOrder, Live, HashOrder, HashReport])
def test_whatever_is_lost_is_said_again_after_a_while(gone: type[object]) -> None:
    world = World(part_bytes=1 << 20, verify_every=1)
    world.settle()
    world.advance()
    rank, lost = world.engines[0].first, 0
    for _ in range(20):
        for way in (rank.inbox, rank.outbox):
            if not lost and way and isinstance(way[0], gone):
                way.popleft()
                lost += 1
        world.engines[0].step()
        if not (not lost and rank.outbox and isinstance(rank.outbox[0], gone)):
            world.publisher_step(0)
    assert lost and not world.of(EngineVerified)
    world.now += RETRY_SECONDS / 2
    assert world.delivery.remind() == [], "it has had no time to answer"
    world.settle()
    world.assert_all_newest()
    assert [report.anchor for report in world.of(VersionReport)] == [False]
    assert [report.version for report in world.of(EngineVerified)] == [world.newest]


def test_a_hello_that_is_lost_in_the_middle_of_an_update_does_not_shut_an_engine_out() -> None:
    """The publisher believes that parts are there which the engine has forgotten."""
    world = World(part_bytes=10, parts_ahead=2)
    world.settle()
    world.advance(1.0)
    rank = world.engines[0].first
    rank.take()
    world.publisher_step(0)
    rank.greet()
    rank.outbox.clear()
    world.settle()
    world.assert_all_newest()


def test_an_order_that_comes_late_or_twice_changes_nothing() -> None:
    world = World(part_bytes=1 << 20)
    world.settle()
    for _ in range(2):
        world.advance()
        world.settle()
    rank = world.engines[0].first
    orders = [message for message in rank.received if isinstance(message, CommitOrder)]
    rank.inbox.extend(orders)
    while rank.inbox:
        world.engines[0].step()
    assert [(type(message), message.target) for message in rank.outbox] == [(Live, world.newest)]
    world.settle()
    world.assert_all_newest()
    assert len(world.of(VersionReport)) == 2


@pytest.mark.parametrize("times", [1, 3, 100])
def test_a_problem_is_answered_with_an_anchor_a_few_times_and_then_ends_the_run_by_name(times: int) -> None:
    world = World(part_bytes=1 << 20)
    world.settle()
    world.advance()
    rank = world.engines[0].first
    try:
        for _ in range(times):
            part = rank.inbox[0]
            broken = PartTaken(attempt=part.attempt, part=part.part, problem="other shapes", **rank.me)
            rank.inbox.clear()
            world.hear(rank.peer, broken)
            assert rank.inbox[0].anchor
    except WeightsError as error:
        text = str(error)
    else:
        text = ""
        world.settle()
        world.assert_all_newest()
    assert ("engine-0" in text and "other shapes" in text) == (times == 100)


def test_parts_that_always_arrive_corrupt_are_a_problem_and_end_the_run_by_name() -> None:
    world = World(part_bytes=1 << 20)
    world.settle()
    world.advance()
    rank = world.engines[0].first

    def always() -> None:
        for _ in range(100):
            rank.inbox[0] = dataclasses.replace(rank.inbox[0], checksum=0)
            world.engines[0].step()
            world.publisher_step(0)

    with pytest.raises(WeightsError, match=r"engine-0 failed 4 times.*arrived corrupt"):
        always()


def test_parts_that_no_engine_can_read_are_a_problem_and_nothing_is_written() -> None:
    world = World(part_bytes=1 << 20)
    world.settle()
    world.advance()
    inbox = world.engines[0].first.inbox
    base = dataclasses.replace(world.chain.prepared(FIRST).parts[0], base=Version(0, 7), checksum=0)  # type: ignore[union-attr]
    sealed = dataclasses.replace(base, checksum=checksum(base))
    inbox[0] = numbered(sealed, inbox[0].attempt)
    world.settle()
    world.assert_all_newest()
    assert [report.anchor for report in world.of(VersionReport)] == [True]
