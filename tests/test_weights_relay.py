"""A publisher that writes a directory, a relay that follows it at another site, and real plugin threads that follow the
relay."""

import asyncio
import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from fake_queue import PATIENCE, FakeQueue, play
from plugin_host import PluginHost
from update_builders import anchor_parts, change_parts
from weights_builders import FIRST, RUN, Tensors, hash_of, make_tensors, perturbed, same_bits

from engines.weights import directory
from engines.weights.chain import Chain
from engines.weights.codes.payload import Code, contents
from engines.weights.outbox import Outbox
from engines.weights.parts import relabelled
from engines.weights.relay import Relay
from stream_rl import config
from stream_rl.errors import WeightsError
from stream_rl.messages import UpdatePart
from stream_rl.transport import Router
from stream_rl.types import Version

PART_BYTES = 60
WEIGHTS = config.Weights(part_bytes=PART_BYTES, parts_ahead=2, verify_every=2)
ROOT = pathlib.Path(__file__).resolve().parents[1]


class Site:
    """A publisher's directory, and the copy of it at another site where a relay follows it."""

    def __init__(self, path: pathlib.Path, anchor_every: int = 4) -> None:
        self.here, self.there = path / "here", path / "there"
        self.rng, self.line = np.random.default_rng(0), [make_tensors(0)]
        self.outbox, self.chain = Outbox(self.here, RUN, PART_BYTES, anchor_every), Chain(RUN, PART_BYTES, 3)
        self.chain.advance(anchor_parts(self.line[0]), self.outbox.write)
        self.outbox.settle(self.chain)
        self.outbox.flush()
        self.address = "tcp://127.0.0.1:0"
        self.copy()

    @property
    def version(self) -> Version:
        return Version(0, len(self.line) - 1)

    def advance(self, versions: int = 1, share: float = 0.1) -> None:
        for _ in range(versions):
            base = self.version
            self.line.append(perturbed(self.line[-1], self.rng, share))
            self.chain.advance(change_parts(*self.line[-2:], base, self.version), self.outbox.write)
            self.outbox.settle(self.chain)
            self.outbox.flush()

    def copy(self, without: str = "") -> None:
        """What is written so far, but for one file, as a tool that copies directories does it."""
        self.there.mkdir(exist_ok=True)
        for file in sorted(self.here.iterdir()):
            if file.name != without:
                new = self.there / f".{file.name}.copying"
                shutil.copy(file, new)
                new.rename(self.there / file.name)

    @contextlib.asynccontextmanager
    async def relay(self, run: str = RUN) -> AsyncIterator[None]:
        """A relay in this process, at the address of the one before."""
        async with Router.bind(self.address) as router:
            self.address = router.address
            running = asyncio.create_task(Relay(self.there, run, router, WEIGHTS).run())
            try:
                yield
            finally:
                running.cancel()
                ends = await asyncio.gather(running, return_exceptions=True)
            assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends

    @contextlib.asynccontextmanager
    async def engine(self) -> AsyncIterator[PluginHost]:
        """One that holds the first version and knows the relay that is there now."""
        async with FakeQueue() as queue, PluginHost(queue.address, self.address, tensors=self.line[0]) as host:
            yield host


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.weights.relay.LOOK_SECONDS", 0.02)


async def reached(host: PluginHost, version: Version, tensors: Tensors) -> None:
    await host.until(lambda: host.weights.version == version)
    assert same_bits(host.model.live(), tensors) and host.weights.weights_hash == hash_of(tensors)


class Said:
    """What relays in this process print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self._lines = capsys, list[dict[str, Any]]()

    async def until(self, host: PluginHost, version: Version) -> None:
        """It was reported that this became live there."""
        async with asyncio.timeout(PATIENCE):
            while not any(report["version"] == list(version) for report in self.of("version")):
                await host.after(5)

    def of(self, kind: str) -> list[dict[str, Any]]:
        self._lines += [json.loads(line) for line in self._capsys.readouterr().out.splitlines()]
        return [line for line in self._lines if line["kind"] == kind]


def test_an_engine_behind_a_relay_gets_every_version_and_the_hashes_match(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site, said = Site(tmp_path), Said(capsys)

    async def scene() -> None:
        async with site.relay(), site.engine() as host:
            for _ in range(6):
                site.advance()
                site.copy()
                await reached(host, site.version, site.line[-1])
            await said.until(host, site.version)

    play(scene)
    assert [report["version"][1] for report in said.of("version")] == [1, 2, 3, 4, 5, 6]
    assert all(report["hash_matches"] and not report["anchor"] for report in said.of("version"))
    assert [report["weights_hash"] for report in said.of("version")] == [hash_of(each) for each in site.line[1:]]
    updates = [directory.load(path) for path in site.there.glob("*.update")]
    assert len(updates) == 6 and {contents(part.payload).code for _, parts in updates for part in parts} == {Code.SMALL}
    assert {report["code"] for report in said.of("version")} == {"fast"}
    verified = said.of("verified")
    assert verified and all(report["weights_hash"] == report["expected"] for report in verified)


def test_a_relay_that_was_restarted_goes_on_and_rolls_no_engine_back(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it begins with an anchor that is older than what the engine holds, and takes its time to read on."""
    site, said = Site(tmp_path), Said(capsys)

    def slow(path: pathlib.Path) -> tuple[directory.About, list[UpdatePart]]:
        time.sleep(0.5)
        return directory.load(path)

    async def scene() -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with site.relay():
                host = await stack.enter_async_context(site.engine())
                site.advance(6)
                site.copy()
                await reached(host, site.version, site.line[-1])
                await said.until(host, site.version)
            monkeypatch.setattr("engines.weights.relay.load", slow)
            async with site.relay():
                await host.after(50)
                site.advance(share=0.02)
                site.copy()
                await said.until(host, site.version)
            monkeypatch.setattr("engines.weights.relay.load", directory.load)
            site.advance(3)
            site.copy()
            async with site.relay():
                await said.until(host, site.version)
            await reached(host, site.version, site.line[-1])

    play(scene)
    live = said.of("version")
    steps = [report["version"][1] for report in live]
    assert steps == sorted(set(steps)) and steps[-3:] == [6, 7, 10]
    assert all(report["hash_matches"] for report in live)
    assert not live[-2]["anchor"], "what the new one began with led on to what the engine held"


def missing(site: Site) -> None:
    site.copy(without=directory.file_name(Version(0, 4), Version(0, 5), False))


def damaged(site: Site) -> None:
    """And it stays so: only an anchor leads past it."""
    site.copy()
    file = site.there / directory.file_name(Version(0, 4), Version(0, 5), False)
    file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize("arrive", [missing, damaged])
def test_a_file_that_is_missing_or_damaged_costs_the_versions_up_to_the_next_anchor(
    tmp_path: pathlib.Path, arrive: Callable[[Site], None]
) -> None:
    site = Site(tmp_path)

    async def scene() -> None:
        async with site.relay(), site.engine() as host:
            site.advance(6)
            arrive(site)
            await reached(host, Version(0, 4), site.line[4])
            await host.after(50)
            assert host.weights.version == Version(0, 4)
            site.advance(2)
            arrive(site)
            await reached(host, Version(0, 8), site.line[8])
            site.advance(1)
            arrive(site)
            await reached(host, Version(0, 9), site.line[9])

    play(scene)


def test_a_relay_begins_at_the_newest_anchor_when_what_came_before_is_gone(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(tmp_path)
    site.advance(14)
    shutil.rmtree(site.there)
    site.copy(without=directory.file_name(Version(0, 8), Version(0, 8), True))
    assert min(target for _, target, _ in directory.listing(site.there)) == Version(0, 8), "which leads nowhere"

    async def scene() -> None:
        async with site.relay(), site.engine() as host:
            await reached(host, Version(0, 14), site.line[14])
            assert caplog.text.count("gets all weights") == 1
            site.advance()
            site.copy()
            await reached(host, Version(0, 15), site.line[15])

    play(scene)


def test_a_relay_that_is_there_before_the_directory_says_so_and_waits(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(tmp_path)
    shutil.rmtree(site.there)

    async def scene() -> None:
        async with site.relay(), site.engine() as host:
            await host.after(50)
            assert "no anchor of run 'r'" in caplog.text and str(site.there) in caplog.text
            site.advance(2)
            site.copy()
            await reached(host, site.version, site.line[-1])

    play(scene)


def test_a_directory_that_cannot_be_read_for_a_while_is_named_once_and_followed_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site, scandir, stale = Site(tmp_path), os.scandir, OSError(errno.ESTALE, "Stale file handle")
    failures = itertools.count()

    def fail(path: pathlib.Path) -> None:
        next(failures)
        raise stale

    async def scene() -> None:
        async with site.relay(), site.engine() as host:
            await host.after(5)
            monkeypatch.setattr(os, "scandir", fail)
            while next(failures) < 8:
                await host.after(5)
            monkeypatch.setattr(os, "scandir", scandir)
            site.advance()
            site.copy()
            await reached(host, site.version, site.line[-1])

    play(scene)
    assert caplog.text.count("Stale file handle") == 1


def test_a_file_that_is_still_being_copied_is_read_again_when_it_has_changed_and_not_before(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be all weights, and there is a look every half second."""
    site, read = Site(tmp_path), Counter[str]()

    def counted(path: pathlib.Path) -> tuple[directory.About, list[UpdatePart]]:
        read[path.name] += 1
        return directory.load(path)

    async def scene() -> None:
        async with site.relay(), site.engine() as host:
            site.advance()
            [name] = {path.name for path in site.here.iterdir()} - {path.name for path in site.there.iterdir()}
            whole = (site.here / name).read_bytes()
            for size in (0, 5, len(whole) - 1):
                (site.there / name).write_bytes(whole[:size])
                await host.after(100)
                assert host.weights.version == FIRST
            (site.there / name).write_bytes(whole)
            await reached(host, site.version, site.line[-1])
            assert 3 <= read[name] <= 7, "once as it is now, and once if it was seen between two writes"

    monkeypatch.setattr("engines.weights.relay.load", counted)
    play(scene)


def test_a_file_under_the_name_of_another_leads_nobody_anywhere(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(tmp_path)
    site.advance(3)
    names = [directory.file_name(Version(0, step), Version(0, step + 1), False) for step in range(3)]

    async def scene() -> None:
        async with site.relay(), site.engine() as host:
            shutil.copy(site.here / names[1], site.there / names[0])
            await host.after(50)
            assert host.weights.version == FIRST
            site.copy()
            await reached(host, site.version, site.line[-1])

    play(scene)
    assert f"{names[0]} is not what its name says, but {names[1]}" in caplog.text


def test_an_engine_of_another_run_is_refused_by_name_and_ends(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(tmp_path)

    async def scene() -> None:
        async with site.relay("other"), site.engine() as host:
            assert await asyncio.to_thread(host.launcher.wait, 20) == -signal.SIGQUIT

    play(scene)
    assert "this publisher serves run 'other', engine engine-0 belongs to 'r'" in caplog.text


def test_a_directory_of_another_run_is_refused_by_name_and_leads_nobody_anywhere(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(tmp_path)

    async def scene() -> None:
        async with site.relay("other"):
            await asyncio.sleep(0.2)

    play(scene)
    warned = [record.message for record in caplog.records if "serves run 'other'" in record.message]
    assert len(warned) == 1 and f"the update is of '{RUN}'" in warned[0], "said once, not at each look"


def test_the_command_brings_an_engine_up_to_date_and_ends_when_told_to(tmp_path: pathlib.Path) -> None:
    site = Site(tmp_path)
    site.advance(5)
    site.copy()
    command = [sys.executable, "-m", "scripts.cli", "weights", "relay", str(site.there), "--run-id", RUN]

    async def scene() -> None:
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
        try:
            assert process.stdout is not None
            ready = json.loads(await process.stdout.readline())
            assert (ready["kind"], ready["directory"]) == ("ready", str(site.there))
            site.address = ready["address"]
            async with site.engine() as host:
                await reached(host, site.version, site.line[-1])
                report = json.loads(await process.stdout.readline())
                assert (report["kind"], report["hash_matches"]) == ("version", True)
                assert report["version"] == list(site.version)
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 10) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    play(scene)


def test_a_fingerprint_that_the_weights_do_not_have_ends_the_relay_by_name(tmp_path: pathlib.Path) -> None:
    """Either the files were changed, or this machine computes wrong."""
    site, wrong = Site(tmp_path), "0" * 16
    path = site.there / directory.file_name(FIRST, FIRST, True)
    about, parts = directory.load(path)
    parts = [relabelled(part, i, len(parts), wrong) for i, part in enumerate(parts)]
    directory.save(path, dataclasses.replace(about, target_hash=wrong), parts)

    async def scene() -> None:
        async with Router.bind(site.address) as router:
            await Relay(site.there, RUN, router, WEIGHTS).run()

    with pytest.raises(WeightsError, match=rf"version 0\.0 has fingerprint .*{wrong}"):
        play(scene)
