"""Whether what is live is what was published: incremental fingerprints after each commit, full ones now and then."""

import dataclasses

import pytest
from delivery_builders import World
from engine_builders import Rank
from weights_builders import FIRST, hash_of

from stream_rl.errors import WeightsError
from stream_rl.messages import EngineVerified, HashOrder, HashReport, Live, UpdatePart, VersionReport


def until_said(world: World, kind: type[object]) -> Rank:
    """The first engine, once it has said something of this kind that nobody has read."""
    world.settle()
    world.advance()
    rank = world.engines[0].first
    for _ in range(100):
        if rank.outbox and isinstance(rank.outbox[0], kind):
            return rank
        world.engines[0].step()
        if rank.outbox and not isinstance(rank.outbox[0], kind):
            world.publisher_step(0)
    raise AssertionError(f"it never said {kind.__name__}")


@pytest.mark.parametrize(
    "damage", [{"weights_hash": "0" * 16}, {"weights_hash": "no hash"}, {"problem": "the device is gone"}]
)
def test_a_version_that_is_not_live_as_published_is_reported_and_answered_with_an_anchor(
    damage: dict[str, str],
) -> None:
    world = World()
    rank = until_said(world, Live)
    rank.outbox[0] = dataclasses.replace(rank.outbox[0], **damage)
    world.settle()
    world.assert_all_newest()
    assert [(report.anchor, report.hash_matches) for report in world.of(VersionReport)] == [
        (False, False),
        (True, True),
    ]


def test_who_lags_is_recomputed_although_it_passes_the_versions_at_which_that_is_due() -> None:
    world = World(verify_every=5)
    world.settle()
    for _ in range(5):
        for _ in range(3):  # the second comes while the first is under way, and then there is a third
            world.advance(0.02)
        world.settle()
    assert [report.version.step for report in world.of(VersionReport)] == [1, 3, 4, 6, 7, 9, 10, 12, 13, 15]
    assert [report.version.step for report in world.of(EngineVerified)] == [6, 10, 15]
    world.fork(3)
    world.settle()
    assert [report.version for report in world.of(EngineVerified)][3:] == [world.newest]


def test_weights_are_recomputed_every_so_many_versions_and_no_update_comes_between() -> None:
    world = World(verify_every=3)
    world.settle()
    for _ in range(7):
        world.advance()
        world.settle([1])
    world.settle()
    assert [report.version.step for report in world.of(EngineVerified, 1)] == [3, 6]
    assert world.engines[1].first.count(HashOrder) == 2
    world.finish()
    assert [report.version.step for report in world.of(EngineVerified, 1)] == [3, 6, 7]
    world = World(verify_every=1)
    rank = until_said(world, HashReport)
    world.advance()
    assert not any(isinstance(message, UpdatePart) for message in rank.inbox)
    world.settle()
    world.assert_all_newest()


def test_no_verification_and_no_update_when_none_is_due() -> None:
    world = World(verify_every=0)
    world.settle()
    for _ in range(4):
        world.advance()
        world.settle()
    assert world.engines[0].first.count(HashOrder) == 0
    assert world.delivery.advance() == [] and not world.remind()


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
    rank = until_said(world, HashReport)
    rank.outbox[0] = dataclasses.replace(rank.outbox[0], version=FIRST)
    world.advance()
    world.settle()
    world.assert_all_newest()


def test_an_engine_whose_weights_never_are_what_they_should_be_ends_the_run_by_name() -> None:
    """Each anchor becomes live as it should, and each recomputation says something else."""
    world = World()
    world.settle()
    world.advance()
    world.settle()
    live = world.engines[0].first.live

    def broken() -> bool:
        raise WeightsError("embed is held twice in this engine, with different bits")

    live.recompute = broken  # type: ignore[method-assign]
    with pytest.raises(WeightsError, match=r"engine-0 failed 4 times.*held twice"):
        world.finish()


# -- the end -----------------------------------------------------------------------------------------------------------


def test_a_version_that_was_verified_before_it_was_known_to_be_final_is_verified_again() -> None:
    world = World(verify_every=1)
    world.settle()
    world.advance()
    world.settle()
    world.finish()
    assert [report.version for report in world.of(EngineVerified)] == [world.newest] * 2
    assert sorted(world.delivery.final_reports) == ["engine-0", "engine-1"]


def test_a_final_version_that_is_said_again_is_not_verified_again() -> None:
    world = World()
    world.settle()
    world.finish()
    reports = dict(world.delivery.final_reports)
    assert sorted(reports) == ["engine-0", "engine-1"]
    assert world.delivery.finish(world.newest) == []
    world.settle()
    assert len(world.of(EngineVerified)) == 1 and world.delivery.final_reports == reports


def test_an_engine_that_is_restarted_after_the_end_is_brought_up_and_verified_and_the_others_are_left_alone() -> None:
    world = World(keep=1)
    world.settle()
    for _ in range(3):
        world.advance(0.02)
        world.settle()
    world.finish()
    world.restart(0)
    world.settle()
    world.assert_all_newest()
    assert [report.anchor for report in world.of(VersionReport)] == [False, False, False, True]
    assert [report.version for report in world.of(EngineVerified)] == [world.newest] * 2
    assert len(world.of(EngineVerified, 1)) == 1


def test_a_final_version_that_comes_after_the_final_one_is_verified_too() -> None:
    """A learner that was restarted at its end goes on from its checkpoint."""
    world = World()
    world.settle()
    world.finish()
    world.fork(0)
    world.settle()
    world.finish()
    assert [report.version for report in world.of(EngineVerified)] == [FIRST, world.newest]
