"""Bringing every engine to the newest version, each at its own pace.

For each engine: parts to every rank, a few ahead of what it has taken; when every rank has taken all of them, one
`CommitOrder`; `Live` from every rank; then the next.  One update is under way to an engine at a time, so an engine's
memory is bounded by one update and a slow engine delays nobody else.

What is not answered is said again after a while, and every answer may come twice.  Who is not known, because this
publisher or the engine was restarted, is told so and says hello; who is silent for too long is forgotten.  Pure:
messages in, (rank's identity, message) out.
"""

import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from engines.weights.chain import Chain, Update
from engines.weights.parts import numbered
from engines.weights.recipient import Recipient, Total, combined
from stream_rl.config import Weights
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
    VersionReport,
)
from stream_rl.types import Version

log = logging.getLogger(__name__)
Outgoing = list[tuple[bytes, Any]]
FromEngine = EngineHello | Alive | PartTaken | Live | HashReport
MAX_FAILURES = 3


class Delivery:
    """All engines of a run."""

    def __init__(
        self,
        run: str,
        incarnation: int,
        chain: Chain,
        weights: Weights,
        retry_s: float,
        silence_s: float,
        clock: Callable[[], float],
    ) -> None:
        """retry_s: what has no answer is said again.  silence_s: who says nothing is forgotten.  Both in seconds of
        `clock`."""
        self._run, self._chain, self._weights = run, chain, weights
        self._retry_s, self._silence_s, self._clock = retry_s, silence_s, clock
        self._attempts = itertools.count((incarnation << 32) + 1)
        """Of no two updates alike, whichever publisher sent them."""
        self._engines: dict[str, Recipient] = {}
        self._final: Version | None = None
        """Once set: verify every engine in full when it is there."""
        self.wanted: set[Version | None] = set()
        """Updates that the chain has to prepare (see Chain.prepare); the shell does, and calls `advance`."""
        self.final_reports: dict[str, EngineVerified] = {}
        """What was found of each engine at the final version, to be said again to a queue that was restarted."""
        self.reports: list[VersionReport | EngineVerified] = []
        """For the queue; the shell sends and clears them."""

    def advance(self) -> Outgoing:
        """The chain has a new version, or has prepared what was wanted."""
        self._forget_silent()
        return [out for engine in self._engines.values() for out in self._next(engine)]

    def finish(self, final: Version) -> Outgoing:
        """No version comes after `final`; may be said any number of times."""
        if final == self._final:
            return []
        self._final = final
        self.final_reports.clear()
        for engine in self._engines.values():
            engine.verified = False
        return self.advance()

    def remind(self) -> Outgoing:
        """To be called often enough: say again what has had no answer for a while."""
        self._forget_silent()
        late = self._clock() - self._retry_s
        outgoing: Outgoing = []
        for engine in self._engines.values():
            if engine.spoken_at <= late and (again := self._unanswered(engine)):
                engine.spoken_at = self._clock()
                outgoing += again
        return outgoing

    def unreachable(self, peer: bytes) -> None:
        """A message to this rank could not be sent.  Its engine is forgotten until it says hello again, which it is
        asked to as soon as it says anything."""
        self._engines = {name: e for name, e in self._engines.items() if peer not in e.peers.values()}

    def handle(self, peer: bytes, message: FromEngine) -> Outgoing:
        """A message of an engine's rank.  Raises WeightsError if an engine cannot be brought up to date at all."""
        self._forget_silent()
        if isinstance(message, EngineHello):
            return self._hello(peer, message)
        engine, rank = self._sender(peer, message)
        if engine is None:
            return [(peer, Refused(reason="unknown_engine", detail="say EngineHello (again)"))]
        engine.seen[rank] = self._clock()
        match message:
            case PartTaken():
                return self._taken(engine, rank, message)
            case Live():
                return self._live(engine, rank, message)
            case HashReport():
                return self._hashed(engine, rank, message)
            case Alive():
                return []

    def _sender(self, peer: bytes, message: Alive | PartTaken | Live | HashReport) -> tuple[Recipient | None, int]:
        """The engine that said hello from there, and which rank of it this is."""
        for engine in self._engines.values():
            for rank, known in engine.peers.items():
                if known == peer and (isinstance(message, Alive) or message.incarnation == engine.incarnation):
                    return engine, rank
        return None, 0

    def _forget_silent(self) -> None:
        """An engine that is gone must not be waited for; one that was only stopped says hello again."""
        latest = self._clock() - self._silence_s
        for engine in list(self._engines.values()):
            if min(engine.seen.values()) < latest:
                log.warning("%s was silent for %.0f s and is forgotten", engine.name, self._silence_s)
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
            engine = self._engines[hello.engine] = Recipient(hello.engine, hello.incarnation, hello.ranks)
        engine.peers[hello.rank], engine.seen[hello.rank] = peer, self._clock()
        engine.hellos[hello.rank] = hello
        engine.drop_update()
        engine.verifying = False
        return self._next(engine)

    def _next(self, engine: Recipient) -> Outgoing:
        if engine.update is not None or engine.verifying or len(engine.peers) < engine.ranks:
            return []
        newest = self._chain.version
        claimed: list[Version | None] = [hello.version for hello in engine.hellos.values()] or [engine.held]
        if newest is None or any(version is not None and version.history > newest.history for version in claimed):
            return []  # nothing leads back to a line of training that has ended: it waits for the new one's versions
        if engine.hellos:
            if self._weights.delivery == "reload" and self._are_loading(engine):
                return []
            self._believe(engine)
        if engine.held != newest:
            if self._weights.delivery == "reload":
                return []  # it says hello again when it has been
            return self._bring_up(engine, engine.held)
        if engine.verify or (engine.held == self._final and not engine.verified):
            return self._verify(engine)
        return []

    def _are_loading(self, engine: Recipient) -> bool:
        """Each rank says hello by itself when it has loaded a version: not all have said so of the same one."""
        versions = {hello.version for hello in engine.hellos.values()}
        return versions != {engine.held} and (len(engine.hellos) < engine.ranks or len(versions) > 1)

    def _believe(self, engine: Recipient) -> None:
        """What the ranks say in their hellos, if they agree with each other and with what was published."""
        versions = {hello.version for hello in engine.hellos.values()}
        known = versions == {engine.held}
        if len(engine.hellos) == engine.ranks:
            held, (total, problem) = max(versions), combined(engine.hellos)
            expected = self._chain.hashes.get(held)
            known = len(versions) == 1 and total == expected and not problem
            if not known:
                log.warning(
                    "%s holds version %s with fingerprint %s; here it is %s", engine.name, held, total, expected
                )
            engine.held = held
        if not known:
            log.warning("%s gets all weights", engine.name)
            engine.held = None
        engine.counted_from = engine.counted_from or self._chain.version
        engine.hellos.clear()

    def _bring_up(self, engine: Recipient, held: Version | None) -> Outgoing:
        update = self._chain.prepared(held)
        if update is None:
            self.wanted.add(held)
            return []
        return self._send(engine, update)

    def _send(self, engine: Recipient, update: Update) -> Outgoing:
        engine.begin(update, next(self._attempts), self._clock())
        return [out for rank in engine.peers for out in self._more(engine, rank)]

    def _more(self, engine: Recipient, rank: int) -> Outgoing:
        """As many parts as the rank has credit for."""
        return [self._part(engine, rank, part) for part in engine.credited(rank, self._weights.parts_ahead)]

    def _part(self, engine: Recipient, rank: int, part: int) -> tuple[bytes, Any]:
        assert engine.update is not None
        return engine.peers[rank], numbered(engine.update.parts[part], engine.attempt)

    def _unanswered(self, engine: Recipient) -> Outgoing:
        """All that has been said and not been answered."""
        if engine.verifying:
            missing = [rank for rank in engine.peers if rank not in engine.hashes]
            return [(engine.peers[rank], HashOrder(version=self._held(engine))) for rank in missing]
        if engine.update is None:
            return []
        if engine.is_staged():
            return self._order(engine, [rank for rank in engine.peers if rank not in engine.live])
        return [self._part(engine, rank, part) for rank in engine.peers for part in engine.in_flight(rank)]

    def _order(self, engine: Recipient, ranks: list[int]) -> Outgoing:
        assert engine.update is not None
        order = CommitOrder(target=engine.update.target, attempt=engine.attempt)
        return [(engine.peers[rank], order) for rank in ranks]

    def _taken(self, engine: Recipient, rank: int, taken: PartTaken) -> Outgoing:
        update = engine.update
        if update is None or taken.attempt != engine.attempt or not 0 <= taken.part < len(update.parts):
            return []
        if taken.problem:
            log.warning("%s cannot take version %s: %s", engine.name, update.target, taken.problem)
            return self._heal(engine, taken.problem)
        if taken.corrupt:
            engine.corrupt += 1
            if engine.corrupt > len(update.parts) * MAX_FAILURES:
                return self._heal(engine, f"{engine.corrupt} parts of version {update.target} arrived corrupt")
            return [self._part(engine, rank, taken.part)]
        if engine.is_staged() or not engine.take(rank, taken.part):
            return []
        engine.spoken_at = self._clock()
        if engine.is_staged():
            engine.staged_at = self._clock()
            return self._order(engine, list(engine.peers))
        return self._more(engine, rank)

    def _heal(self, engine: Recipient, problem: str) -> Outgoing:
        """An anchor needs no base and writes every element.  Raises WeightsError if that keeps failing too."""
        engine.failures += 1
        times = max(engine.failures, engine.mismatches)
        if times > MAX_FAILURES:
            raise WeightsError(f"{engine.name} failed {times} times in a row to hold what was published: {problem}")
        engine.drop_update()
        engine.held = None
        return self._next(engine)

    def _live(self, engine: Recipient, rank: int, live: Live) -> Outgoing:
        update = engine.update
        if update is None or live.attempt != engine.attempt or live.target != update.target:
            return []
        engine.live[rank] = live
        if len(engine.live) < engine.ranks:
            return []
        ranks = list(engine.live.values())
        total, problem = self._judged(engine.live, update.target)
        problem = next((each.problem for each in ranks if each.problem), problem)
        self.reports.append(
            VersionReport(
                engine=engine.name,
                version=update.target,
                anchor=update.anchor,
                update_bytes=update.bytes,
                full_bytes=self._chain.full_bytes,
                changed=update.changed,
                elements=self._chain.elements,
                code="anchor" if update.anchor else "fast",
                encode_seconds=update.encode_seconds,
                send_seconds=engine.staged_at - engine.sent_at,
                stage_seconds=max(each.stage_seconds for each in ranks),
                stall_seconds=max(each.stall_seconds for each in ranks),
                commit_seconds=self._clock() - engine.sent_at,
                weights_hash=total,
                hash_matches=not problem,
                forward_counts=sorted({each.forward_count for each in ranks}),
            )
        )
        engine.drop_update()
        engine.held = update.target
        if problem:
            log.error("%s: version %s did not become live as published: %s", engine.name, update.target, problem)
            return self._heal(engine, problem)
        engine.failures = 0
        engine.verify = engine.verify or self._is_due(engine, update.target)
        if engine.verify:
            return self._verify(engine)
        return self._next(engine)

    def _is_due(self, engine: Recipient, live: Version) -> bool:
        """A multiple of weights.verify_every has been reached, or passed: what lags does not get every version."""
        every, counted = self._weights.verify_every, engine.counted_from
        if every < 1 or counted is None:
            return False
        return live.history != counted.history or live.step // every > counted.step // every

    def _judged(self, ranks: Mapping[int, Total], version: Version) -> tuple[str, str]:
        """Fingerprint of a whole engine, and what is wrong with it, if anything is."""
        total, problem = combined(ranks)
        expected = self._chain.hashes[version]
        return total, problem or ("" if total == expected else f"its fingerprint is {total}, not {expected}")

    def _held(self, engine: Recipient) -> Version:
        assert engine.held is not None
        return engine.held

    def _verify(self, engine: Recipient) -> Outgoing:
        engine.verify, engine.verifying, engine.spoken_at = False, True, self._clock()
        engine.counted_from = self._held(engine)
        engine.hashes.clear()
        return [(peer, HashOrder(version=self._held(engine))) for peer in engine.peers.values()]

    def _hashed(self, engine: Recipient, rank: int, report: HashReport) -> Outgoing:
        if not engine.verifying:
            return []
        held = self._held(engine)
        if report.version != held:
            engine.verifying, engine.verify = False, True
            return self._next(engine)
        engine.hashes[rank] = report
        if len(engine.hashes) < engine.ranks:
            return []
        engine.verifying = False
        total, problem = self._judged(engine.hashes, held)
        verified = EngineVerified(
            engine=engine.name, version=held, weights_hash=problem or total, expected=self._chain.hashes[held]
        )
        self.reports.append(verified)
        if held == self._final:
            self.final_reports[engine.name] = verified
            engine.verified = not problem
        if problem:
            log.error("%s: recomputed at version %s: %s", engine.name, held, problem)
            engine.mismatches += 1
            return self._heal(engine, problem)
        engine.mismatches = 0
        return self._next(engine)
