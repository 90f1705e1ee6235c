"""One engine under load that follows made-up versions: the processes are real, this process plays everybody else.

It is the queue that takes the engine's chunks and looks at every token's version, the learner that hands versions to
the publisher, and the actors whose requests keep the engine busy.
"""

import asyncio
import contextlib
import random
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engines.sglang.client import EngineClient
from scripts.processes import Child
from stream_rl import config
from stream_rl.errors import PeerTimeout, StreamRLError
from stream_rl.messages import (
    Ack,
    Chunks,
    EngineStats,
    EngineVerified,
    Hello,
    LearnerDone,
    UpdatePart,
    VersionOffer,
    VersionReport,
    VersionTaken,
    VersionWanted,
    Welcome,
)
from stream_rl.transport import Dealer, Router
from stream_rl.types import Version, make_rid

if TYPE_CHECKING:
    from engines.weights.rehearsal import Rehearsal

RUN, ENGINE = "bench", "engine-0"
STOP_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 600.0
PROMPT_TOKENS = 64
FIRST = Version(0, 0)


@dataclass(slots=True)
class _Stream:
    """What has come of one request."""

    last: Version
    """Of its newest token; before the first, what was live when it was asked for."""
    tokens: int = 0
    checksum: int = 0


class Tokens:
    """Looks at every token that an engine streams."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}
        self._ended: dict[str, tuple[int, int]] = {}
        """Tokens and checksum of requests of which either the stream or the answer is here, and not yet the other."""
        self._versions: Counter[Version] = Counter()
        self.count = 0
        self.problems: Counter[str] = Counter()
        """What must not be, by name."""

    def asked(self, rid: str, live: Version) -> None:
        """A request is about to be sent, while this version was known to be live."""
        self._streams[rid] = _Stream(live)

    def answered(self, rid: str, token_ids: Iterable[int]) -> None:
        """The whole answer, as SGLang itself gives it."""
        ids = np.fromiter(token_ids, np.int32)
        self._ends(rid, len(ids), zlib.crc32(ids.tobytes()))

    def look_at(self, chunks: Chunks, newest: Version) -> None:
        """newest: of the versions that were published."""
        spans: dict[int, list[tuple[Version, int]]] = {}
        for row, history, step, count in chunks.spans.tolist():
            spans.setdefault(row, []).append((Version(history, step), count))
        offset = 0
        for row, rid in enumerate(chunks.rids):
            count, versions = int(chunks.counts[row]), spans.get(row, [])
            stream = self._streams.get(rid)
            if stream is None:
                self.problems["tokens of no request"] += 1
                stream = self._streams[rid] = _Stream(FIRST)
            self.problems["tokens out of order"] += int(chunks.starts[row]) != stream.tokens
            self.problems["tokens without a version"] += sum(n for _, n in versions) != count
            for version, n in versions:
                # a request that was asked for under a live version is not sampled by an older one
                self.problems["a version older than the one before"] += version < stream.last
                self.problems["a version that is not there yet"] += version > newest
                stream.last = version
                self._versions[version] += n
            ids = np.ascontiguousarray(chunks.token_ids[offset : offset + count], np.int32)
            stream.checksum = zlib.crc32(ids.tobytes(), stream.checksum)
            stream.tokens += count
            offset += count
            if chunks.finishes[row]:
                self._ends(rid, stream.tokens, stream.checksum)
                del self._streams[rid]
        self.count += offset

    def of_no_version(self, live: Iterable[Version]) -> int:
        """Tokens whose version is none of these: it was published, and the engine never made it live."""
        known = set(live)
        return sum(count for version, count in self._versions.items() if version not in known)

    def _ends(self, rid: str, tokens: int, checksum: int) -> None:
        other = self._ended.pop(rid, None)
        if other is None:
            self._ended[rid] = tokens, checksum
        else:
            self.problems["a stream that is not the answer"] += other != (tokens, checksum)


class Followed:
    """`following` makes it."""

    learner: Dealer
    """Its connection to the publisher."""
    address: str
    """The engine's, of its HTTP server."""

    def __init__(self, recipe: config.Recipe, rehearsal: "Rehearsal", router: Router) -> None:
        self._rehearsal, self._router = rehearsal, router
        self._patience = recipe.supervise.peer_timeout_s
        self._changed = asyncio.Condition()
        self._next_sequence = 0
        self.version = FIRST
        """The newest that was published."""
        self.phase = ""
        """Versions are reported under its name."""
        self.reports: list[tuple[str, VersionReport]] = []
        self.stats: list[EngineStats] = []
        self.verified: list[EngineVerified] = []
        self.tokens = Tokens()

    async def serve(self) -> None:
        """Consumes: what engine and publisher tell the queue.  Waits for: the next.  Produces: answers, and what is
        noted here.  Unblocked by: both of them.  Raises StreamRLError when the engine's plugin has given up."""
        while True:
            peer, message = await self._router.receive()
            match message:
                case Hello():
                    taken = self._next_sequence if message.role == "engine" else 0
                    await self._router.send(peer, Welcome(run=RUN, next_sequence=taken))
                case Chunks():
                    if message.sequence == self._next_sequence:
                        self._next_sequence += 1
                        self.tokens.look_at(message, self.version)
                    resend = message.sequence > self._next_sequence
                    await self._router.send(peer, Ack(next_sequence=self._next_sequence, resend=resend))
                case EngineStats():
                    if message.counters["faults"]:
                        raise StreamRLError("the engine's plugin failed; the engine's log says why")
                    self.stats.append(message)
                case VersionReport():
                    self.reports.append((self.phase, message))
                case EngineVerified():
                    self.verified.append(message)
            async with self._changed:
                self._changed.notify_all()

    async def until(self, reached: Callable[[], object], what: str) -> None:
        """Wait for what the engine and the publisher say to make it so.  Raises PeerTimeout."""
        try:
            async with asyncio.timeout(self._patience), self._changed:
                await self._changed.wait_for(reached)
        except TimeoutError:
            raise PeerTimeout(f"waited {self._patience:.0f} s for {what}") from None

    async def fresh_stats(self) -> EngineStats:
        """Counters that were read after this call."""
        seen = len(self.stats)
        await self.until(lambda: len(self.stats) >= seen + 2, "the engine's counters")
        return self.stats[-1]

    # -- the learner -------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Hand over the version that the engine was started with."""
        await self._hand_over(self.version, self.version, await asyncio.to_thread(self._rehearsal.anchor, self.version))

    async def publish(self, share: float) -> None:
        """Hand over the next version, when the engine is at most one behind."""
        await self.until(lambda: self.live >= Version(0, self.version.step - 1), "the last version but one to be live")
        base, target = self.version, Version(0, self.version.step + 1)
        self.version = target
        await self._hand_over(base, target, self._rehearsal.next(share, base, target))

    async def settled(self) -> None:
        """All that was published is live."""
        await self.until(lambda: self.live == self.version, f"version {self.version} to be live")

    async def verify(self) -> EngineVerified:
        """There is no further version: the engine's fingerprint from all of its parameters."""
        await self.learner.send(LearnerDone(final=self.version, weights_hash=""))
        await self.until(lambda: self.verified, "the full recomputation")
        return self.verified[-1]

    async def _hand_over(self, base: Version, target: Version, parts: list[UpdatePart]) -> None:
        answer = await self.learner.request(
            VersionOffer(base=base, target=target), VersionWanted, timeout=self._patience
        )
        if answer.anchor != (base == target):
            raise StreamRLError(f"the publisher wants all weights at {target}, and has just had {base}")
        for part in parts:
            await self.learner.send(part)
        if not isinstance(taken := await self.learner.receive(self._patience), VersionTaken):
            raise StreamRLError(f"the publisher answered version {target} with {taken}")

    @property
    def live(self) -> Version:
        """The newest that is known to be."""
        return self.reports[-1][1].version if self.reports else FIRST

    # -- the actors --------------------------------------------------------------------------------------------

    async def ask(self, member: int, tokens: tuple[int, int], vocab: int) -> None:
        """Consumes: answers.  Waits for: the last request's.  Produces: one request after the other, each for a random
        number of tokens in this range, the first for fewer, so that they end at different times.  Unblocked by: the
        engine."""
        chance = random.Random(member)
        async with EngineClient(ENGINE, self.address, timeout_seconds=REQUEST_TIMEOUT_S) as client:
            group = 0
            while True:
                prompt = [chance.randrange(vocab) for _ in range(PROMPT_TOKENS)]
                count = chance.randint(tokens[0] if group else 1, tokens[1])
                sampling = {"max_new_tokens": count, "temperature": 1.0, "ignore_eos": True}
                rid = make_rid(RUN, group, member, 0)
                self.tokens.asked(rid, self.live)
                self.tokens.answered(rid, (await client.generate(rid, prompt, sampling)).token_ids)
                group += 1


@contextlib.asynccontextmanager
async def following(
    recipe: config.Recipe, rehearsal: "Rehearsal", requests: int, vocab: int
) -> AsyncIterator[Followed]:
    """An engine that serves `requests` at a time and its publisher, in the run's folder, until the end of the block.

    Raises ProcessDied, in a group, with the end of a log.
    """
    directory = recipe.run_directory
    directory.mkdir(parents=True)
    file = directory / "recipe.toml"
    config.dump(recipe, file)
    children: list[Child] = []

    async def start(name: str, module: str, *words: str) -> Child:
        arguments = (str(file), "--run-id", RUN, "--queue", router.address, *words)
        children.append(await Child.start(name, module, arguments, directory / f"{name}.log", threads=1))
        return children[-1]

    async def address(child: Child) -> str:
        return str((await child.ready(recipe.engine.start_timeout_s))["address"])

    try:
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            router = await stack.enter_async_context(Router.bind("tcp://127.0.0.1:0"))
            followed = Followed(recipe, rehearsal, router)
            loops = [tasks.create_task(followed.serve())]
            publisher = await address(await start("publisher", "engines.weights.publisher"))
            followed.learner = await stack.enter_async_context(Dealer.connect(publisher, "learner-0"))
            engine = await start(ENGINE, "engines.sglang.server", "--name", ENGINE, "--publisher", publisher)
            await followed.begin()
            followed.address = await address(engine)
            loops += [tasks.create_task(_watch(child)) for child in children]
            most = recipe.rollout.max_new_tokens
            for member in range(requests):
                loops.append(tasks.create_task(followed.ask(member, (most // 2, most), vocab)))
            yield followed
            for loop in loops:
                loop.cancel()
    finally:
        for child in reversed(children):
            await child.stop(STOP_TIMEOUT_S)


@contextlib.asynccontextmanager
async def publishing(followed: Followed, share: float, rate: float) -> AsyncIterator[None]:
    """`rate` versions a second that change this share come until the end of the block; one that is on its way is
    finished."""
    stopping = asyncio.Event()

    async def beat() -> None:
        clock = asyncio.get_running_loop().time
        due = clock()
        while not stopping.is_set():
            await followed.publish(share)
            due = max(due + 1 / rate, clock())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await stopping.wait()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(beat())
        yield
        stopping.set()


async def _watch(child: Child) -> None:
    """Raises ProcessDied when the process ends by itself: nobody would answer."""
    raise child.died(f"ended with status {await child.end()}")
