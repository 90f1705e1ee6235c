"""Delivery against simulated engines that stage and commit with the real code: all get to the newest version."""

import dataclasses

import pytest
from delivery_builders import ENGINES, Engine, Ranks, World, play
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weights_builders import FIRST, RUN, bits_of, hash_of, make_tensors, same_bits

from engines.weights.chain import Chain
from stream_rl.errors import WeightsError
from stream_rl.messages import (
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

LIGHT = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@LIGHT
@given(st.data(), st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(0, 3), st.sampled_from([10, 40, 10_000]))
def test_every_engine_reaches_the_newest_version_bit_for_bit_and_is_verified(
    data: st.DataObject, seed: int, verify_every: int, keep: int, part_bytes: int
) -> None:
    world = World(seed, verify_every, keep, part_bytes)
    play(world, data, ["restart", "stale", "corrupt"])
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
@given(st.data(), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_bits_that_flip_in_live_weights_are_found_and_repaired_by_the_final_verification(
    data: st.DataObject, seed: int, verify_every: int
) -> None:
    world = World(seed, verify_every)
    play(world, data, ["restart", "flip", "flip"])
    assert all(engine.live.version == world.newest for engine in world.engines)
    world.finish()
    world.assert_all_newest()


@LIGHT
@given(st.data(), st.integers(0, 2**32 - 1), st.integers(0, 2))
def test_answers_that_come_twice_in_a_row_change_nothing(data: st.DataObject, seed: int, verify_every: int) -> None:
    world = World(seed, verify_every)
    play(world, data, ["repeat", "repeat", "restart"])
    world.finish()
    world.assert_all_newest()


def test_a_version_costs_one_delta_one_order_and_one_report() -> None:
    world = World(part_bytes=1 << 20)
    world.settle()
    assert not any(engine.received for engine in world.engines)
    world.advance(0.02)
    world.now = 5.0
    world.settle([0])
    [part, order] = world.engines[0].received
    assert isinstance(part, UpdatePart) and not part.anchor and isinstance(order, CommitOrder)
    [report] = world.of(VersionReport)
    update = world.chain.update_from(FIRST)
    assert update is not None
    assert (report.version, report.anchor, report.hash_matches) == (Version(0, 1), False, True)
    assert (report.update_bytes, report.changed) == (update.bytes, update.changed)
    assert (report.full_bytes, report.elements) == (world.chain.full_bytes, world.chain.elements)
    stage_seconds = world.engines[0].live.stage_seconds
    assert (report.commit_seconds, report.stage_seconds, report.stall_seconds) == (5.0, stage_seconds, 0.25)


def test_a_slow_engine_delays_nobody_and_catches_up_by_deltas_or_one_anchor() -> None:
    world = World(keep=3)
    world.settle()
    for _ in range(3):
        world.advance()
        world.settle([1])
        assert world.engines[1].live.version == world.newest and world.engines[0].live.version == FIRST
    sent = len(world.engines[0].inbox)
    assert sent == len(world.chain.update_from(FIRST).parts), "one update waits for the slow engine, not all"  # type: ignore[union-attr]
    for _ in range(7):
        world.advance()
        world.settle([1])
    assert len(world.engines[0].inbox) == sent
    world.settle()
    world.assert_all_newest()
    assert [report.anchor for report in world.of(VersionReport)] == [False, True]
    assert [report.anchor for report in world.of(VersionReport, 1)] == [False] * 10


def test_a_restarted_engine_takes_the_place_of_its_old_incarnation_which_is_fenced() -> None:
    world = World()
    world.settle()
    world.advance()
    old = world.engines[0]
    while old.live.staged is None:
        old.step()
    world.restart(0)
    world.settle()
    world.assert_all_newest()
    while world.stale:
        world.hear(*world.stale.popleft())
    for message in (
        old.hello(),
        Live(target=world.newest, weights_hash="0", stage_seconds=0, stall_seconds=0, **old.me),
    ):
        world.hear(old.peer, message)
    assert {refused.reason for refused in world.refused} == {"fenced", "unknown_engine"}
    world.advance()
    world.settle()
    world.assert_all_newest()


def test_an_engine_that_cannot_be_reached_is_forgotten_until_it_says_hello_again() -> None:
    world = World()
    world.settle()
    world.delivery.unreachable(b"somebody")
    world.delivery.unreachable(world.engines[0].peer)
    world.advance()
    world.settle([1])
    assert world.engines[1].live.version == world.newest and not world.engines[0].inbox
    world.settle()  # its next sign of life brings the question who it is
    world.assert_all_newest()
    assert world.engines[0].count(Refused) == 1


def test_an_engine_of_another_run_or_one_that_never_said_hello_is_refused() -> None:
    world = World()
    stranger = dataclasses.replace(world.engines[0].hello(), run="other", engine="engine-9")
    [(peer, refused)] = world.delivery.handle(b"x", stranger)
    assert (peer, refused.reason) == (b"x", "other_run") and "'r'" in refused.detail and "'other'" in refused.detail
    [(_, refused)] = world.delivery.handle(b"x", Staged(engine="engine-9", incarnation=1, rank=0, target=FIRST))
    assert refused.reason == "unknown_engine"
    world.settle()
    [(_, refused)] = world.delivery.handle(b"x", dataclasses.replace(world.engines[0].hello(), incarnation=0))
    assert refused.reason == "fenced"


@pytest.mark.parametrize("hello_first", [True, False])
@pytest.mark.parametrize("version", [FIRST, Version(0, 9)])
def test_an_engine_that_does_not_hold_what_it_says_gets_an_anchor(hello_first: bool, version: Version) -> None:
    world = World()
    world.engines[1].outbox.clear()
    other = make_tensors(99)
    engine = world.engines[0] = Engine("engine-0", 1, other)
    engine.live.version = version
    hello = engine.hello()
    if hello_first:
        world.chain = Chain(RUN, 40, 3)
        world.delivery = world.new_delivery()
        assert world.delivery.handle(engine.peer, hello) == []
        world.chain.advance(FIRST, bits_of(world.line[0]))
        world.route(world.delivery.advance(), None, "")
    else:
        world.hear(engine.peer, hello)
    engine.outbox.clear()
    assert [part.anchor for part in engine.inbox] == [True] * len(world.chain.anchor().parts)
    world.settle([0])
    assert engine.live.version == FIRST and same_bits(engine.model.live(), world.line[0])


def test_a_problem_with_a_delta_is_answered_with_an_anchor() -> None:
    world = World()
    world.settle()
    world.advance()
    world.corrupt(0)
    world.settle()
    world.assert_all_newest()
    assert [report.anchor for report in world.of(VersionReport)] == [True]
    assert [report.anchor for report in world.of(VersionReport, 1)] == [False]


@pytest.mark.parametrize("times", [1, 2, 100])
def test_a_problem_with_an_anchor_is_tried_again_a_few_times_and_then_ends_the_run_by_name(times: int) -> None:
    world = World(keep=0, part_bytes=1 << 20)
    world.settle()
    world.advance()
    inbox = world.engines[0].inbox
    try:
        for _ in range(times):
            inbox[0] = dataclasses.replace(inbox[0], checksum=0)
            world.engines[0].step()
            world.publisher_step(0)
    except WeightsError as error:
        text = str(error)
    else:
        text = ""
        world.settle()
        world.assert_all_newest()
    assert ("engine-0" in text and "corrupt" in text) == (times == 100)


@pytest.mark.parametrize("damaged", [2, 5])
def test_several_problems_with_one_delta_are_one_problem(damaged: int) -> None:
    world = World(part_bytes=10)
    world.settle()
    world.advance(1.0)
    inbox = world.engines[0].inbox
    assert len(inbox) > damaged
    for i in range(damaged):
        inbox[i] = dataclasses.replace(inbox[i], checksum=0)
    world.settle()
    world.assert_all_newest()
    assert [report.anchor for report in world.of(VersionReport)] == [True]


def live_waiting(world: World) -> Engine:
    """The first engine, once its Live is on the wire."""
    world.settle()
    world.advance()
    engine = world.engines[0]
    while not any(isinstance(message, Live) for message in engine.outbox):
        engine.step()
        if engine.outbox and not isinstance(engine.outbox[0], Live):
            world.publisher_step(0)
    return engine


@pytest.mark.parametrize(
    "damage", [{"weights_hash": "0" * 16}, {"weights_hash": "no hash"}, {"problem": "the device is gone"}]
)
def test_a_version_that_is_not_live_as_published_is_reported_and_answered_with_an_anchor(
    damage: dict[str, str],
) -> None:
    world = World()
    engine = live_waiting(world)
    engine.outbox[0] = dataclasses.replace(engine.outbox[0], **damage)
    world.settle()
    world.assert_all_newest()
    assert [(report.anchor, report.hash_matches) for report in world.of(VersionReport)] == [
        (False, False),
        (True, True),
    ]


def test_weights_are_recomputed_every_so_many_versions_and_no_update_comes_between() -> None:
    world = World(verify_every=3)
    world.settle()
    for _ in range(7):
        world.advance()
        world.settle([1])
    world.settle()
    assert [report.version.step for report in world.of(EngineVerified, 1)] == [3, 6]
    assert world.engines[1].count(HashOrder) == 2
    world.finish()
    assert [report.version.step for report in world.of(EngineVerified, 1)] == [3, 6, 7]
    world = World(verify_every=1)
    world.settle()
    world.advance()
    engine = world.engines[0]
    while not any(isinstance(message, HashOrder) for message in engine.inbox):
        engine.step()
        world.publisher_step(0)
    world.advance()
    assert not any(isinstance(message, UpdatePart) for message in engine.inbox)
    world.settle()
    world.assert_all_newest()


def test_no_verification_and_no_update_when_none_is_due() -> None:
    world = World(verify_every=0)
    world.settle()
    for _ in range(4):
        world.advance()
        world.settle()
    assert world.engines[0].count(HashOrder) == 0
    assert world.delivery.advance() == []


def test_a_flipped_bit_is_reported_and_repaired_at_the_next_verification() -> None:
    world = World(verify_every=2, seed=3)
    world.settle()
    world.advance()
    world.settle()
    world.flip(0)
    world.advance(0.0)
    world.settle()
    first, *_ = world.of(EngineVerified)
    assert first.weights_hash != first.expected == hash_of(world.line[-1])
    assert [report.anchor for report in world.of(VersionReport)] == [False, False, True]
    world.assert_all_newest()


def test_a_hash_of_a_version_that_moved_meanwhile_is_asked_for_again() -> None:
    world = World(verify_every=1)
    world.settle()
    world.advance()
    engine = world.engines[0]
    while not any(isinstance(message, HashReport) for message in engine.outbox):
        engine.step()
        if engine.outbox and not isinstance(engine.outbox[0], HashReport):
            world.publisher_step(0)
    engine.outbox[0] = dataclasses.replace(engine.outbox[0], version=FIRST)
    world.advance()
    world.settle()
    world.assert_all_newest()


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
        engine.greet()
        world.settle()
        world.advance()
        world.settle()
        world.assert_all_newest()


# -- several ranks: messages only, since only tp_size = 1 can be staged ------------------------------------------------


def test_nothing_is_sent_before_every_rank_has_said_hello() -> None:
    ranks = Ranks(3)
    ranks.chain.advance(Version(0, 1), bits_of(ranks.next))
    assert ranks.hello(2) == [] and ranks.hello(0) == [] and ranks.delivery.advance() == []
    sent = ranks.hello(1)
    assert sorted(peer for peer, _ in sent) == [b"e/0", b"e/1", b"e/2"]
    assert not any(part.anchor for _, part in sent), "their fingerprints add up to the version they hold"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_commit_is_ordered_once_from_rank_0_when_all_ranks_have_staged(order: tuple[int, ...]) -> None:
    ranks = Ranks(3)
    assert len(ranks.begin()) == 3
    assert ranks.staged(order[0]) == [] and ranks.staged(order[0]) == [], "the same rank twice is not two ranks"
    assert ranks.staged(order[1]) == []
    assert [(peer, type(message)) for peer, message in ranks.staged(order[2])] == [(b"e/0", CommitOrder)]
    assert ranks.live(order[0]) == [] and ranks.live(order[1]) == [] and not ranks.delivery.reports
    assert ranks.live(order[2]) == []
    [report] = ranks.delivery.reports
    assert isinstance(report, VersionReport) and report.hash_matches and report.stage_seconds == 3.0


def test_one_rank_with_a_problem_means_an_anchor_for_all_and_no_commit_of_the_delta() -> None:
    ranks = Ranks(2)
    ranks.begin()
    assert ranks.staged(0) == []
    anchor = ranks.staged(1, "corrupt")
    assert [(peer, part.anchor) for peer, part in anchor] == [(b"e/0", True), (b"e/1", True)]
    assert ranks.staged(1, attempt=2) == [], "rank 0 staged the delta, not the anchor"
    assert [type(message) for _, message in ranks.staged(0, attempt=2)] == [CommitOrder]


def test_one_rank_with_other_bits_means_a_report_and_an_anchor_for_all() -> None:
    ranks = Ranks(2)
    ranks.begin()
    ranks.staged(0), ranks.staged(1), ranks.live(0)
    sent = ranks.live(1, weights_hash="0" * 16)
    assert [(peer, part.anchor) for peer, part in sent] == [(b"e/0", True), (b"e/1", True)]
    [report] = ranks.delivery.reports
    assert isinstance(report, VersionReport) and not report.hash_matches
    assert ranks.live(1) == [] and len(ranks.delivery.reports) == 1, "rank 0 was live with the delta, not the anchor"


@pytest.mark.parametrize("rank", [-1, 1, 7])
def test_a_rank_that_an_engine_does_not_have_does_not_count(rank: int) -> None:
    ranks = Ranks(1)
    fields = {"run": RUN, "ranks": 1, "version": FIRST, "weights_hash": ranks.chain.hashes[FIRST]}
    [(_, refused)] = ranks.tell(EngineHello, rank, **fields)
    assert refused.reason == "bad_rank"
    ranks.chain.advance(Version(0, 1), bits_of(ranks.next))
    assert ranks.delivery.advance() == []
    assert ranks.tell(EngineHello, 0, **fields)
    stray = ranks.tell(Staged, rank, target=Version(0, 1))
    assert not any(isinstance(message, CommitOrder) for _, message in stray)
