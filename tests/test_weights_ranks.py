"""Engines of several ranks: all have staged before any commits, and what they hold alike is compared.

Two ranks stage and commit with the real code; of more, only what they say and in which order."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from delivery_builders import RETRY_SECONDS, World
from update_builders import change_parts, make_chain
from weights_builders import FIRST, RUN, hash_of, make_tensors, perturbed

from engines.weights import fingerprint
from engines.weights.delivery import Delivery, Outgoing
from engines.weights.recipient import combined
from stream_rl import config
from stream_rl.messages import (
    CommitOrder,
    EngineHello,
    EngineVerified,
    HashOrder,
    HashReport,
    Live,
    PartTaken,
    UpdatePart,
    VersionReport,
)
from stream_rl.types import Version


class Ranks:
    """An engine of several ranks whose fingerprints add up to the model's; only what it says, and in which order."""

    def __init__(self, ranks: int, verify_every: int = 0, part_bytes: int = 1 << 20, parts_ahead: int = 2) -> None:
        self.ranks, self.tensors = ranks, make_tensors(0)
        self.chain = make_chain(self.tensors, part_bytes)
        self.next = perturbed(self.tensors, np.random.default_rng(0), 0.1)
        self.part_bytes = part_bytes
        weights = config.Weights(part_bytes=part_bytes, parts_ahead=parts_ahead, verify_every=verify_every)
        self.delivery = Delivery(RUN, 0, self.chain, weights, RETRY_SECONDS, math.inf, lambda: 0.0)

    def share(self, version: Version, rank: int) -> str:
        """Random shares that add up to the version's fingerprint."""
        shares = [int(n) for n in np.random.default_rng(version.step).integers(0, 2**63, self.ranks)]
        shares[-1] = (int(self.chain.hashes[version], 16) - sum(shares[:-1])) % (1 << 64)
        return fingerprint.text(shares[rank])

    def tell(self, kind: type[Any], rank: int, **fields: Any) -> Outgoing:
        """What is said then, with what was prepared for it."""
        out = self.delivery.handle(f"e/{rank}".encode(), kind(engine="e", incarnation=1, rank=rank, **fields))
        return out + self.work()

    def work(self) -> Outgoing:
        out: Outgoing = []
        while self.delivery.wanted:
            self.chain.prepare(self.delivery.wanted.pop())
            out += self.delivery.advance()
        return out

    def hello(self, rank: int, **change: Any) -> Outgoing:
        fields = {"version": FIRST, "weights_hash": self.share(FIRST, rank), "replicas": {}} | change
        return self.tell(EngineHello, rank, run=RUN, ranks=self.ranks, **fields)

    def taken(self, rank: int, part: int = 0, attempt: int = 1, **change: Any) -> Outgoing:
        return self.tell(PartTaken, rank, part=part, attempt=attempt, **change)

    def live(self, rank: int, attempt: int = 1, **change: Any) -> Outgoing:
        fields = {
            "weights_hash": self.share(Version(0, 1), rank),
            "replicas": {},
            "stage_seconds": 1.0 + rank,
            "stall_seconds": 0.5,
        } | change
        return self.tell(Live, rank, target=Version(0, 1), attempt=attempt, **fields)

    def publish(self) -> Outgoing:
        parts = change_parts(self.tensors, self.next, FIRST, Version(0, 1), part_bytes=self.part_bytes)
        self.chain.advance(parts)
        return self.delivery.advance() + self.work()

    def begin(self) -> Outgoing:
        for rank in range(self.ranks):
            assert self.hello(rank) == []
        return self.publish()


def both(outgoing: Outgoing) -> list[tuple[bytes, bool]]:
    """To whom, and whether it is part of an anchor."""
    return [(peer, message.anchor) for peer, message in outgoing if isinstance(message, UpdatePart)]


def test_nothing_is_sent_before_every_rank_has_said_hello() -> None:
    ranks = Ranks(3)
    ranks.publish()
    assert ranks.hello(2) == [] and ranks.hello(0) == [] and ranks.delivery.advance() == []
    sent = ranks.hello(1)
    assert sorted(both(sent)) == [(b"e/0", False), (b"e/1", False), (b"e/2", False)], "their shares add up"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_all_ranks_are_told_of_the_commit_once_when_all_have_staged(order: tuple[int, ...]) -> None:
    ranks = Ranks(3)
    assert len(ranks.begin()) == 3
    assert ranks.taken(order[0]) == [] and ranks.taken(order[0]) == [], "the same rank twice is not two ranks"
    assert ranks.taken(order[1]) == []
    told = ranks.taken(order[2])
    assert all(isinstance(order, CommitOrder) for _, order in told)
    assert sorted((peer, order.target, order.attempt) for peer, order in told) == [
        (f"e/{rank}".encode(), Version(0, 1), 1) for rank in range(3)
    ]
    assert ranks.taken(order[2]) == []
    assert ranks.live(order[0]) == [] and ranks.live(order[1]) == [] and not ranks.delivery.reports
    assert ranks.live(order[2]) == []
    [report] = ranks.delivery.reports
    assert isinstance(report, VersionReport) and report.hash_matches and report.stage_seconds == 3.0


def test_each_rank_has_credit_of_its_own() -> None:
    ranks = Ranks(2, part_bytes=1, parts_ahead=2)
    sent = ranks.begin()
    assert [(peer, part.part) for peer, part in sent] == [(b"e/0", 0), (b"e/0", 1), (b"e/1", 0), (b"e/1", 1)]
    assert [(peer, part.part) for peer, part in ranks.taken(1, 0)] == [(b"e/1", 2)]
    assert [(peer, part.part) for peer, part in ranks.taken(1, 1)] == [(b"e/1", 3)]
    assert ranks.taken(1, 1) == [], "said twice"
    assert ranks.taken(0, 7) == [], "never sent"
    [(peer, again)] = ranks.taken(0, 1, corrupt=True)
    assert (peer, again.part) == (b"e/0", 1)
    assert [(peer, part.part) for peer, part in ranks.taken(0, 1)] == [(b"e/0", 2)], "whichever comes first"


def test_one_rank_with_a_problem_means_an_anchor_for_all_and_no_commit_of_the_delta() -> None:
    ranks = Ranks(2)
    ranks.begin()
    assert ranks.taken(0) == []
    assert both(ranks.taken(1, problem="other shapes")) == [(b"e/0", True), (b"e/1", True)]
    assert ranks.taken(1, attempt=2) == [], "rank 0 staged the delta, not the anchor"
    assert [type(message) for _, message in ranks.taken(0, attempt=2)] == [CommitOrder, CommitOrder]


@pytest.mark.parametrize(
    "damage", [{"weights_hash": "0" * 16}, {"weights_hash": "no hash"}, {"problem": "the device is gone"}]
)
def test_one_rank_that_is_not_live_as_published_means_a_report_and_an_anchor_for_all(damage: dict[str, str]) -> None:
    ranks = Ranks(2)
    ranks.begin()
    ranks.taken(0), ranks.taken(1), ranks.live(0)
    assert both(ranks.live(1, **damage)) == [(b"e/0", True), (b"e/1", True)]
    [report] = ranks.delivery.reports
    assert isinstance(report, VersionReport) and not report.hash_matches
    assert ranks.live(1) == [] and len(ranks.delivery.reports) == 1, "rank 0 was live with the delta, not the anchor"


def test_copies_that_differ_between_ranks_mean_a_report_and_an_anchor_for_all() -> None:
    ranks = Ranks(3)
    ranks.begin()
    for rank in range(3):
        ranks.taken(rank)
    alike, other = {"0,1,2": "a" * 16}, {"0,1,2": "b" * 16}
    ranks.live(0, replicas=alike), ranks.live(1, replicas=alike)
    assert both(ranks.live(2, replicas=other)) == [(b"e/0", True), (b"e/1", True), (b"e/2", True)]
    assert not ranks.delivery.reports[0].hash_matches  # type: ignore[union-attr]


def test_copies_that_differ_in_the_hellos_mean_an_anchor() -> None:
    for other in ("a" * 16, "b" * 16):
        ranks = Ranks(2)
        ranks.publish()
        ranks.hello(0, replicas={"0,1": "a" * 16})
        sent = ranks.hello(1, replicas={"0,1": other})
        assert both(sent) == [(b"e/0", other[0] == "b"), (b"e/1", other[0] == "b")]


def test_a_rank_that_says_hello_again_makes_all_ranks_begin_again() -> None:
    ranks = Ranks(2)
    ranks.begin()
    assert ranks.taken(0) == []
    assert both(ranks.hello(1)) == [(b"e/0", False), (b"e/1", False)]
    assert ranks.taken(1, attempt=1) == [] == ranks.taken(1, attempt=2), "rank 0 staged what it was to forget"
    assert [type(message) for _, message in ranks.taken(0, attempt=2)] == [CommitOrder, CommitOrder]


@pytest.mark.parametrize("rank", [-1, 1, 7])
def test_a_rank_that_an_engine_does_not_have_does_not_count(rank: int) -> None:
    ranks = Ranks(1)
    fields = {"run": RUN, "ranks": 1, "version": FIRST, "weights_hash": ranks.chain.hashes[FIRST], "replicas": {}}
    [(_, refused)] = ranks.tell(EngineHello, rank, **fields)
    assert refused.reason == "bad_rank"
    assert ranks.publish() == []
    assert ranks.tell(EngineHello, 0, **fields)
    stray = ranks.taken(rank)
    assert not any(isinstance(message, CommitOrder) for _, message in stray)


def test_a_verification_asks_every_rank_again_that_has_not_answered() -> None:
    world = World(ranks=2, verify_every=1)
    world.settle()
    world.advance()
    first, second = world.engines[0].ranks
    for _ in range(50):
        world.engines[0].step(0), world.engines[0].step(1)
        while second.outbox and not isinstance(second.outbox[0], HashReport):
            world.publisher_step(0, 1)
        world.publisher_step(0, 0)
    assert not first.outbox and [type(message) for message in second.outbox] == [HashReport]
    second.outbox.clear()
    world.remind()
    assert [type(message) for message in second.inbox] == [HashOrder] and not first.inbox
    world.settle()
    assert len(world.of(EngineVerified)) == 1


# -- two ranks that stage and commit for real --------------------------------------------------------------------------


def test_two_ranks_share_what_they_hold_and_each_counts_a_copy_once() -> None:
    world = World(ranks=2, verify_every=1)
    world.settle()
    for _ in range(3):
        world.advance()
        world.settle()
        world.assert_all_newest()
    ranks = dict(enumerate(rank.hello() for rank in world.engines[0].ranks))
    assert combined(ranks) == (hash_of(world.line[-1]), "")
    assert ranks[0].replicas == ranks[1].replicas and ranks[0].replicas.keys() == {"0,1"}
    assert [report.anchor for report in world.of(VersionReport)] == [False] * 3
    assert [report.weights_hash for report in world.of(EngineVerified)] == [hash_of(t) for t in world.line[1:]]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bit_of_a_copy_that_flips_on_one_rank_is_found_and_healed(rank: int) -> None:
    """On rank 1 it is in nobody's sum: only the comparison of the copies sees it."""
    world = World(ranks=2, verify_every=2)
    world.settle()
    world.advance(0.0)
    world.settle()
    fingerprint.bits_of(world.engines[0].ranks[rank].model.norm.data)[0] ^= 1
    world.advance(0.0)
    world.settle()
    first, *_ = world.of(EngineVerified)
    assert first.weights_hash != first.expected and "different copies" in first.weights_hash
    assert [report.anchor for report in world.of(VersionReport)] == [False, False, True]
    world.assert_all_newest()


def test_the_tests_of_copies_can_fail() -> None:
    """Without what the ranks say of their copies, the same flip on rank 1 is never seen."""
    world = World(ranks=2, verify_every=1)
    world.settle()
    fingerprint.bits_of(world.engines[0].ranks[1].model.norm.data)[0] ^= 1
    world.advance(0.0)
    rank = world.engines[0].ranks
    for _ in range(50):
        for i in range(2):
            world.engines[0].step(i)
            if rank[i].outbox and isinstance(rank[i].outbox[0], HashReport):
                rank[i].outbox[0] = dataclasses.replace(rank[i].outbox[0], replicas={})
            world.publisher_step(0, i)
    assert [report.weights_hash for report in world.of(EngineVerified)] == [hash_of(world.line[-1])]
    assert not rank[1].holds(world.line[-1])


@pytest.mark.parametrize("when", ["before", "staged", "ordered", "live"])
def test_rank_1_loses_its_conversation_at_any_moment_and_both_switch_in_the_same_turn(when: str) -> None:
    world = World(ranks=2, part_bytes=1 << 20)
    world.settle()
    world.advance()
    engine = world.engines[0]
    first, second = engine.ranks
    if when != "before":
        first.take(), second.take()
    if when in ("ordered", "live"):
        world.publisher_step(0, 0), world.publisher_step(0, 1)
        first.take()
        assert engine.ordered == (world.newest, first.live.staged[1] if first.live.staged else 0)
    if when == "live":
        engine.step()
        assert first.live.version == second.live.version == world.newest
    second.inbox.clear()
    second.outbox.clear()
    second.greet()
    world.settle()
    world.assert_all_newest()
    world.finish()
    assert first.live.version == second.live.version
    assert world.of(EngineVerified)[-1].weights_hash == hash_of(world.line[-1])


def test_what_a_dead_publisher_ordered_becomes_live_on_rank_1_too_although_it_greeted_the_new_one() -> None:
    world = World(ranks=2, part_bytes=1 << 20)
    world.settle()
    world.advance()
    engine = world.engines[0]
    first, second = engine.ranks
    for rank in (0, 1):
        engine.ranks[rank].take()
        world.publisher_step(0, rank)
    first.take()
    assert engine.ordered is not None and second.live.staged is not None
    world.restart_publisher()
    second.greet()
    assert second.live.staged is None
    engine.step()
    assert first.live.version == second.live.version == world.newest
    assert all(rank.holds(world.line[-1]) for rank in engine.ranks)
    world.settle()
    world.assert_all_newest()
