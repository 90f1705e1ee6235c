"""A publisher at another site: follows a directory of updates instead of a learner.

    stream-rl weights relay DIRECTORY --run-id R --bind ADDRESS

The directory may be a shared file system, or a copy of it that something else keeps up to date.  Engines connect to a
relay as to any publisher.
"""

import asyncio
import json
import logging
import pathlib
import sys
import time
from dataclasses import asdict

from engines.weights.chain import Chain
from engines.weights.delivery import Delivery, Outgoing
from engines.weights.directory import file_name, following, load
from stream_rl import config
from stream_rl.errors import WeightsError
from stream_rl.messages import Alive, EngineHello, HashReport, Live, PartTaken, Refused, VersionReport
from stream_rl.transport import Router

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.5
"""Between two looks into the directory: file systems that are shared between machines tell nobody of a new file."""
Look = tuple[int, int, int]
"""Size and times of a file: enough to see that it was written to."""


class Relay:
    """One chain that follows a directory, and the engines that follow the chain."""

    def __init__(self, directory: pathlib.Path, run: str, router: Router, weights: config.Weights) -> None:
        self._directory, self._run, self._router = directory, run, router
        supervise = config.Supervise()
        self._retry_s = supervise.retry_s
        self._chain = Chain(run, weights.part_bytes, weights.keep_deltas)
        # a restarted relay must not use the numbers of the one before
        self._delivery = Delivery(
            run, int(time.time()), self._chain, weights, self._retry_s, supervise.silence_timeout_s, time.monotonic
        )
        self._unusable: dict[pathlib.Path, Look | None] = {}
        """Files that led nowhere, as they were then; once they have changed they are looked at again.  None for one
        that could not be read: the next time."""
        self._problem = ""
        """That was reported last."""

    async def run(self) -> None:
        """Until it is cancelled."""
        while await self._look():  # an engine may hold any version that is here already
            pass
        if self._chain.version is None:
            log.warning("there is no anchor of run %r in %s yet: waiting for one", self._run, self._directory)
        async with asyncio.TaskGroup() as tasks:
            for loop in (self.serve(), self.follow(), self.remind()):
                tasks.create_task(loop)

    async def serve(self) -> None:
        """Consumes: what engines say.  Waits for: the next.  Produces: updates.  Unblocked by: the engines."""
        while True:
            peer, message = await self._router.receive()
            match message:
                case EngineHello() | Alive() | PartTaken() | Live() | HashReport():
                    await self._say(self._delivery.handle(peer, message))
                case _:
                    detail = f"a relay has no use for a {type(message).__name__}"
                    await self._say([(peer, Refused(reason="unexpected", detail=detail))])

    async def follow(self) -> None:
        """Consumes: files.  Waits for: one that leads on.  Produces: the chain's newest version, prepared updates.
        Unblocked by: whoever writes the directory."""
        while True:
            while self._delivery.wanted:
                await asyncio.to_thread(self._chain.prepare, self._delivery.wanted.pop())
                await self._say(self._delivery.advance())
            if not await self._look():
                await asyncio.sleep(LOOK_SECONDS)

    async def remind(self) -> None:
        """Consumes: time.  Waits for: half of supervise.retry_s.  Produces: what has had no answer, once more.
        Unblocked by: the clock."""
        while True:
            await asyncio.sleep(self._retry_s / 2)
            await self._say(self._delivery.remind())

    async def _look(self) -> bool:
        """True if a file has led on.  One that cannot be used is passed over for a newer anchor, until it changes: it
        may be copied here at this moment."""
        await asyncio.to_thread(self._forget_changed)
        while (path := await self._next_file()) is not None:
            if await self._take(path):
                return True
        return False

    def _forget_changed(self) -> None:
        for path, look in list(self._unusable.items()):
            if look is None or _look_at(path) != look:
                del self._unusable[path]

    async def _next_file(self) -> pathlib.Path | None:
        try:
            return await asyncio.to_thread(following, self._directory, self._chain.version, self._unusable)
        except WeightsError as error:  # of a file system that may be back soon
            self._report(str(error))
            return None

    async def _take(self, path: pathlib.Path) -> bool:
        """True if the chain is at the file's version now."""
        look = await asyncio.to_thread(_look_at, path)
        try:
            about, parts = await asyncio.to_thread(load, path)
            if path.name != (name := file_name(about.base, about.target, about.anchor)):
                raise WeightsError(f"{path} is not what its name says, but {name}")
            await asyncio.to_thread(self._chain.advance, parts)
        except WeightsError as error:
            self._report(f"{path.name}: {error}")
            self._unusable[path] = None if isinstance(error.__cause__, OSError) else look
            return False
        version = self._chain.version
        assert version is not None
        if self._chain.hashes[version] != about.target_hash:
            raise WeightsError(
                f"version {version} has fingerprint {self._chain.hashes[version]} here, {path} states "
                f"{about.target_hash}; start the relay again, and it begins with an anchor"
            )
        log.info("version %s from %s", version, path.name)
        await self._say(self._delivery.advance())
        return True

    def _report(self, problem: str) -> None:
        """Once, though it is met at every look."""
        if self._problem != problem:
            log.warning("%s", problem)
        self._problem = problem

    async def _say(self, outgoing: Outgoing) -> None:
        for peer, message in outgoing:
            if not await self._router.send(peer, message):
                self._delivery.unreachable(peer)
        reports, self._delivery.reports = self._delivery.reports, []
        for report in reports:
            kind = "version" if isinstance(report, VersionReport) else "verified"
            print(json.dumps({"kind": kind} | asdict(report)), file=sys.stdout, flush=True)


def _look_at(path: pathlib.Path) -> Look | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
