"""Bringing every engine to the newest version, each at its own pace.

For each engine: parts to every rank, `Staged` from every rank, one `CommitOrder` to rank 0, `Live` from every rank,
then the next.  One update is under way to an engine at a time, so an engine's memory is bounded by one update and a
slow engine delays nobody else.  Who is not known, because this publisher or the engine was restarted, is told so and
says hello; who is silent for too long is forgotten.  Pure: messages in, (rank's identity, message) out.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engines.weights.chain import Chain, Update
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
    VersionReport,
)
from stream_rl.types import Version

log = logging.getLogger(__name__)
Outgoing = list[tuple[bytes, Any]]
MAX_FAILURES = 3


@dataclass(slots=True)
class _Engine:
    """What the publisher knows of one engine."""

    name: str
    incarnation: int
    ranks: int
    held: Version
    """The version that it last said was live."""
    peers: dict[int, bytes] = field(default_factory=dict)
    """Identity of each rank that has said hello."""
    seen: dict[int, float] = field(default_factory=dict)
    """When each rank last said anything."""
    claims: dict[int, str] = field(default_factory=dict)
    """Fingerprint that each rank's hello stated for `held`; emptied once it was compared."""
    update: Update | None = None
    sent_at: float = 0.0
    staged: set[int] = field(default_factory=set)
    live: dict[int, Live] = field(default_factory=dict)
    hashes: dict[int, HashReport] = field(default_factory=dict)
    verify: bool = False
    """A full recomputation is due when no update is under way."""
    verifying: bool = False
    attempt: int = 0
    """Number of the update sent last; answers name the one they mean."""
    failures: int = 0
    """Updates in a row that did not become live as published."""


class Delivery:
    """All engines of a run."""

    def __init__(
        self,
        run: str,
        incarnation: int,
        chain: Chain,
        verify_every: int,
        silence_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._run, self._chain, self._verify_every = run, chain, verify_every
        self._silence_seconds, self._clock = silence_seconds, clock
        self._attempts = itertools.count((incarnation << 32) + 1)
        """Of no two updates alike, whichever publisher sent them."""
        self._engines: dict[str, _Engine] = {}
        self._final: Version | None = None
        """Once set: verify every engine in full when it is there."""
        self.final_reports: dict[str, EngineVerified] = {}
        """What was found of each engine at the final version, to be said again to a queue that was restarted."""
        self.reports: list[VersionReport | EngineVerified] = []
        """For the queue; the shell sends and clears them."""

    def advance(self) -> Outgoing:
        """The chain has a new version."""
        self._forget_silent()
        return [out for engine in self._engines.values() for out in self._next(engine)]

    def finish(self, final: Version) -> Outgoing:
        """No version comes after `final`; may be said any number of times."""
        if final == self._final:
            return []
        self._final = final
        self.final_reports.clear()
        return self.advance()

    def unreachable(self, peer: bytes) -> None:
        """A message to this rank could not be sent.  Its engine is forgotten until it says hello again, which it is
        asked to as soon as it says anything."""
        self._engines = {name: e for name, e in self._engines.items() if peer not in e.peers.values()}

    def handle(self, peer: bytes, message: EngineHello | Alive | Staged | Live | HashReport) -> Outgoing:
        """A message of an engine's rank.  Raises WeightsError if an engine cannot be brought up to date at all."""
        self._forget_silent()
        if isinstance(message, EngineHello):
            return self._hello(peer, message)
        engine, rank = self._sender(peer, message)
        if engine is None:
            return [(peer, Refused(reason="unknown_engine", detail="say EngineHello (again)"))]
        engine.seen[rank] = self._clock()
        match message:
            case Staged():
                return self._staged(engine, message)
            case Live():
                return self._live(engine, message)
            case HashReport():
                return self._hashed(engine, message)
            case Alive():
                return []

    def _sender(self, peer: bytes, message: Alive | Staged | Live | HashReport) -> tuple[_Engine | None, int]:
        """The engine that said hello from there, and which rank of it this is."""
        for engine in self._engines.values():
            for rank, known in engine.peers.items():
                if known == peer and (isinstance(message, Alive) or message.incarnation == engine.incarnation):
                    return engine, rank
        return None, 0

    def _forget_silent(self) -> None:
        """An engine that is gone must not be waited for; one that was only stopped says hello again."""
        latest = self._clock() - self._silence_seconds
        for engine in list(self._engines.values()):
            if min(engine.seen.values()) < latest:
                log.warning("%s was silent for %.0f s and is forgotten", engine.name, self._silence_seconds)
                del self._engines[engine.name]

    def _hello(self, peer: bytes, hello: EngineHello) -> Outgoing:
        if hello.run != self._run:
            detail = f"this publisher serves run {self._run!r}, engine {hello.engine} belongs to {hello.run!r}"
            return [(peer, Refused(reason="other_run", detail=detail))]
        if not 0 <= hello.rank < hello.ranks:
            return [(peer, Refused(reason="bad_rank", detail=f"rank {hello.rank} of {hello.ranks}"))]
        engine = self._engines.get(hello.engine)
        if engine is not None and hello.incarnation < engine.incarnation:
            return [(peer, Refused(reason="fenced", detail=f"{hello.engine} has restarted since"))]
        if engine is None or hello.incarnation > engine.incarnation:
            engine = self._engines[hello.engine] = _Engine(hello.engine, hello.incarnation, hello.ranks, hello.version)
        engine.peers[hello.rank], engine.seen[hello.rank] = peer, self._clock()
        engine.update, engine.verifying = None, False
        engine.held = hello.version
        engine.claims[hello.rank] = hello.weights_hash
        return self._next(engine)

    def _next(self, engine: _Engine) -> Outgoing:
        if engine.update is not None or engine.verifying or len(engine.peers) < engine.ranks:
            return []
        if self._chain.version is None or self._chain.version.history < engine.held.history:
            return []  # nothing leads back to a line of training that has ended: it waits for the new one's versions
        if engine.claims:
            claimed, expected = _total(list(engine.claims.values())), self._chain.hashes.get(engine.held)
            engine.claims.clear()
            if claimed != expected:
                why = "is from before this publisher's time" if expected is None else "should have other bits"
                log.warning("%s holds version %s, which %s; it gets an anchor", engine.name, engine.held, why)
                return self._send(engine, self._chain.anchor())
        update = self._chain.update_from(engine.held)
        if update is not None:
            return self._send(engine, update)
        if engine.verify or engine.held == self._final:
            return self._verify(engine)
        return []

    def _send(self, engine: _Engine, update: Update) -> Outgoing:
        engine.update, engine.sent_at = update, self._clock()
        engine.attempt = next(self._attempts)
        engine.staged.clear()
        engine.live.clear()
        parts = [dataclasses.replace(part, attempt=engine.attempt) for part in update.parts]
        return [(peer, part) for peer in engine.peers.values() for part in parts]

    def _staged(self, engine: _Engine, staged: Staged) -> Outgoing:
        if engine.update is None or staged.attempt != engine.attempt or staged.rank not in engine.peers:
            return []
        if staged.problem:
            log.warning("%s cannot take version %s: %s", engine.name, staged.target, staged.problem)
            return self._heal(engine, staged.problem)
        engine.staged.add(staged.rank)
        if len(engine.staged) < engine.ranks:
            return []
        return [(engine.peers[0], CommitOrder(target=engine.update.target))]

    def _heal(self, engine: _Engine, problem: str) -> Outgoing:
        """An anchor needs no base and writes every element.  Raises WeightsError if that keeps failing too."""
        engine.failures += 1
        if engine.failures > MAX_FAILURES:
            raise WeightsError(
                f"{engine.name} failed {engine.failures} times in a row to take an update; last: {problem}"
            )
        return self._send(engine, self._chain.anchor())

    def _live(self, engine: _Engine, live: Live) -> Outgoing:
        update = engine.update
        if update is None or live.target != update.target or live.rank not in engine.peers:
            return []
        engine.live[live.rank] = live
        if len(engine.live) < engine.ranks:
            return []
        ranks = list(engine.live.values())
        total = _total([rank.weights_hash for rank in ranks])
        problems = [rank.problem for rank in ranks if rank.problem]
        matches = total == self._chain.hashes[update.target] and not problems
        self.reports.append(
            VersionReport(
                engine=engine.name,
                version=update.target,
                anchor=update.anchor,
                update_bytes=update.bytes,
                full_bytes=self._chain.full_bytes,
                changed=update.changed,
                elements=self._chain.elements,
                encode_seconds=update.encode_seconds,
                stage_seconds=max(rank.stage_seconds for rank in ranks),
                stall_seconds=max(rank.stall_seconds for rank in ranks),
                commit_seconds=self._clock() - engine.sent_at,
                weights_hash=total,
                hash_matches=matches,
            )
        )
        engine.update, engine.held = None, update.target
        if not matches:
            log.error("%s: version %s did not become live as published", engine.name, update.target)
            return self._heal(engine, problems[0] if problems else f"it holds {total}")
        engine.failures = 0
        engine.verify = engine.verify or (self._verify_every > 0 and update.target.step % self._verify_every == 0)
        if engine.verify:
            return self._verify(engine)
        return self._next(engine)

    def _verify(self, engine: _Engine) -> Outgoing:
        engine.verify, engine.verifying = False, True
        engine.hashes.clear()
        return [(peer, HashOrder(version=engine.held)) for peer in engine.peers.values()]

    def _hashed(self, engine: _Engine, report: HashReport) -> Outgoing:
        if not engine.verifying or report.rank not in engine.peers:
            return []
        if report.version != engine.held:
            engine.verifying, engine.verify = False, True
            return self._next(engine)
        engine.hashes[report.rank] = report
        if len(engine.hashes) < engine.ranks:
            return []
        engine.verifying = False
        total = _total([each.weights_hash for each in engine.hashes.values()])
        expected = self._chain.hashes[report.version]
        verified = EngineVerified(engine=engine.name, version=report.version, weights_hash=total, expected=expected)
        self.reports.append(verified)
        if report.version == self._final:
            self.final_reports[engine.name] = verified
        if total != expected:
            log.error(
                "%s: live weights of version %s are %s, expected %s", engine.name, report.version, total, expected
            )
            return self._heal(engine, f"its live weights are {total}")
        if self._final == engine.held:
            return []
        return self._next(engine)


def _total(hashes: list[str]) -> str:
    """Fingerprint of a model from those of its ranks; what a rank could not compute stays readable."""
    try:
        return f"{sum(int(each, 16) for each in hashes) % (1 << 64):016x}"
    except ValueError:
        return "; ".join(hashes)
