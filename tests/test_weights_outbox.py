"""What the publisher writes and when: whatever the file system does, nobody waits for it and a follower gets there."""

import asyncio
import errno
import os
import pathlib
import threading
from typing import Any

import numpy as np
import pytest
from fake_queue import play
from plugin_host import PluginHost
from publisher_builders import learning, live, publishing
from update_builders import anchor_parts, applied, change_parts
from weights_builders import RUN, make_tensors, perturbed, same_bits

from engines.weights import directory
from engines.weights.chain import Chain
from engines.weights.outbox import Outbox
from stream_rl.errors import WeightsError
from stream_rl.types import Version


class Line:
    """Versions that are taken one after another, and what is written of them."""

    def __init__(self, path: pathlib.Path, anchor_every: int = 100) -> None:
        self.path, self.rng, self.step = path, np.random.default_rng(0), 0
        self.outbox, self.chain = Outbox(path, RUN, 64, anchor_every), Chain(RUN, 64, 3)
        self.tensors = make_tensors(0)
        self.chain.advance(anchor_parts(self.tensors), self.outbox.write)
        self.outbox.settle(self.chain)

    def advance(self, steps: int = 1, share: float = 0.1) -> None:
        """One version, so many steps on: the learner puts them together while the publisher is slow."""
        new = perturbed(self.tensors, self.rng, share)
        base, self.step = Version(0, self.step), self.step + steps
        self.chain.advance(change_parts(self.tensors, new, base, Version(0, self.step)), self.outbox.write)
        self.outbox.settle(self.chain)
        self.tensors = new

    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir())

    def leads_to_the_newest(self) -> bool:
        chain = Chain(RUN, 64, 3)
        while (file := directory.following(self.path, chain.version)) is not None:
            chain.advance(directory.load(file)[1])
        return chain.version == Version(0, self.step) and same_bits(applied(chain.prepare(None), None), self.tensors)


class Gate:
    """A file system that hangs while it is closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.begun, self.written = threading.Event(), threading.Event(), list[str]()
        monkeypatch.setattr("engines.weights.outbox.save", self._save)

    def _save(self, path: pathlib.Path, *contents: Any) -> None:
        self.begun.set()
        assert self.open.wait(30)
        directory.save(path, *contents)
        self.written.append(path.name)


def waiting_bytes(line: Line) -> int:
    return sum(file.bytes for file in line.outbox._waiting)


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_what_waits_for_a_file_system_that_hangs_is_bounded_and_an_anchor_follows(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    line, gate = Line(tmp_path), Gate(monkeypatch)
    writer = threading.Thread(target=line.outbox.flush)
    writer.start()
    assert gate.begun.wait(20)
    for _ in range(100):
        line.advance(share=share)
        assert waiting_bytes(line) <= 3.5 * line.chain.full_bytes and len(line.outbox._waiting) <= 65
    gate.open.set()
    writer.join(20)
    assert not writer.is_alive() and len(gate.written) < 100
    line.advance(share=0.05)
    line.outbox.flush()
    assert gate.written[-1] == "000000.000000101.anchor" and line.leads_to_the_newest()
    line.advance(share=0.05)
    line.outbox.flush()
    assert gate.written[-1].endswith("102.from.000000.000000101.update") and line.leads_to_the_newest()


def test_a_file_that_fails_while_others_wait_for_it_takes_them_along(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(tmp_path)
    line.outbox.flush()

    def full(path: pathlib.Path, *_: Any) -> None:
        line.advance()  # at this moment
        raise WeightsError(f"cannot write {path}")

    line.advance()
    line.advance()
    monkeypatch.setattr("engines.weights.outbox.save", full)
    line.outbox.flush()
    monkeypatch.setattr("engines.weights.outbox.save", directory.save)
    line.outbox.flush()
    assert line.names() == ["000000.000000000.anchor"]
    line.advance()
    line.outbox.flush()
    assert line.names()[1:] == ["000000.000000004.anchor"] and line.leads_to_the_newest()


def test_anchors_come_after_so_many_files_whatever_steps_are_left_out(tmp_path: pathlib.Path) -> None:
    """Of a learner that always puts two steps together only odd ones come, and none of them divides by the interval."""
    line = Line(tmp_path, anchor_every=4)
    line.advance(1)
    for _ in range(20):
        line.advance(2)
        line.outbox.flush()
        assert len(line.names()) <= 3 * 4 + 2
    assert [name for name in line.names() if name.endswith("anchor")] == [
        "000000.000000031.anchor",
        "000000.000000039.anchor",
    ]
    assert line.leads_to_the_newest()


def test_what_a_publisher_that_was_killed_was_writing_is_removed(tmp_path: pathlib.Path) -> None:
    (tmp_path / f".000000.000000009.anchor.writing-{os.getpid() + 1}").write_bytes(b"half")
    (tmp_path / ".mine").write_bytes(b"somebody's")
    Line(tmp_path).outbox.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "000000.000000000.anchor"]


def test_files_that_cannot_be_removed_cost_nothing_but_room(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: pathlib.Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    line = Line(tmp_path, anchor_every=1)
    line.outbox.flush()
    for _ in range(4):
        line.advance()
        line.outbox.flush()
    assert len(line.names()) == 9 and "is not pruned" in caplog.text and line.leads_to_the_newest()


def test_a_directory_of_another_run_is_refused_by_name_and_left_alone(tmp_path: pathlib.Path) -> None:
    line = Line(tmp_path)
    line.outbox.flush()
    with pytest.raises(WeightsError, match=r"anchor belongs to run 'r', this one is 's'; name another"):
        Outbox(tmp_path, "s", 64, 4)
    Outbox(tmp_path, RUN, 64, 4)
    [path] = tmp_path.iterdir()
    path.write_bytes(b"torn")
    Outbox(tmp_path, "s", 64, 4)
    assert path.read_bytes() == b"torn"


def test_engines_and_the_learner_go_on_while_a_directory_hangs_and_what_waits_is_written_at_the_end(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, first, gate = np.random.default_rng(0), make_tensors(0), Gate(monkeypatch)

    async def scene() -> None:
        async with (
            publishing(directory=str(tmp_path)) as (queue, publisher, dealer),
            learning(dealer, first) as learner,
            PluginHost(queue.address, publisher.address, tensors=first) as host,
        ):
            for step in range(1, 9):
                await learner.step(rng, 0.02)
                await queue.until(lambda step=step: any(report.version.step == step for report in live(queue)))
            assert same_bits(host.model.live(), learner.line[-1])
            assert gate.begun.is_set() and not gate.written
            asyncio.get_running_loop().call_later(0.1, gate.open.set)

    play(scene)
    chain = Chain(RUN, 64, 3)
    while (file := directory.following(tmp_path, chain.version)) is not None:
        chain.advance(directory.load(file)[1])
    assert chain.version == Version(0, 8) and not list(tmp_path.glob(".*"))
