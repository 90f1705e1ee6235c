"""Updates in files: whoever follows the directory holds the same bits, whatever is torn, lost or late."""

import json
import os
import pathlib
import struct
import tracemalloc
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from update_builders import anchor_parts, applied, change_parts, make_chain
from weights_builders import FIRST, RUN, Tensors, hash_of, make_tensors, perturbed, same_bits

from engines.weights import directory
from engines.weights.chain import Chain
from engines.weights.directory import describe, following, listing, load
from engines.weights.outbox import Outbox
from engines.weights.parts import SLICE, checksum
from scripts.weights_cli import weights
from stream_rl.errors import WeightsError
from stream_rl.messages import UpdatePart
from stream_rl.types import Version

LIGHT = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)


class Written:
    """A publisher that writes a directory, and the line of versions that it publishes."""

    def __init__(self, path: pathlib.Path, anchor_every: int = 4, dtype: torch.dtype = torch.bfloat16) -> None:
        self.rng = np.random.default_rng(0)
        self.line: list[Tensors] = []
        self.outbox = Outbox(path, RUN, 64, anchor_every)
        self.chain = Chain(RUN, 64, 3)
        self.first = make_tensors(0, dtype)

    def advance(self, versions: int = 1) -> None:
        for _ in range(versions):
            if not self.line:
                self.line.append(self.first)
                self.chain.advance(anchor_parts(self.line[0]), self.outbox.write)
            else:
                self.line.append(perturbed(self.line[-1], self.rng, 0.1))
                base, target = Version(0, len(self.line) - 2), Version(0, len(self.line) - 1)
                self.chain.advance(change_parts(*self.line[-2:], base, target), self.outbox.write)
            self.outbox.settle(self.chain)
            self.outbox.flush()


def follow(chain: Chain, path: pathlib.Path) -> list[pathlib.Path]:
    """As far as the directory leads."""
    read = []
    while (file := following(path, chain.version)) is not None:
        about, parts = load(file)
        chain.advance(parts)
        assert chain.version is not None and chain.hashes[chain.version] == about.target_hash
        read.append(file)
    return read


def held(chain: Chain) -> Tensors:
    return applied(chain.prepare(None), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_who_begins_at_any_time_gets_to_the_newest_version(tmp_path: pathlib.Path, dtype: torch.dtype) -> None:
    written = Written(tmp_path, dtype=dtype)
    early = Chain(RUN, 64, 3)
    for count in range(1, 14):
        written.advance()
        late = Chain(RUN, 64, 3)
        for follower in (early, late):
            follow(follower, tmp_path)
            assert follower.version == Version(0, count - 1)
            assert same_bits(held(follower), written.line[-1])
            assert follower.hashes[Version(0, count - 1)] == hash_of(written.line[-1])


def test_the_directory_is_bounded_and_has_two_anchors(tmp_path: pathlib.Path) -> None:
    written = Written(tmp_path, anchor_every=3)
    written.advance(20)
    files = sorted(path.name for _, _, path in listing(tmp_path))
    assert files == [
        "000000.000000015.anchor",
        "000000.000000015.from.000000.000000014.update",
        "000000.000000016.from.000000.000000015.update",
        "000000.000000017.from.000000.000000016.update",
        "000000.000000018.anchor",
        "000000.000000018.from.000000.000000017.update",
        "000000.000000019.from.000000.000000018.update",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == files, "nothing half written is left"


def test_a_follower_that_misses_a_file_goes_on_from_the_next_anchor(tmp_path: pathlib.Path) -> None:
    written = Written(tmp_path, anchor_every=4)
    written.advance(6)
    (tmp_path / directory.file_name(Version(0, 4), Version(0, 5), False)).unlink()
    follower = Chain(RUN, 64, 3)
    follow(follower, tmp_path)
    assert follower.version == Version(0, 4)
    written.advance(2)
    assert follow(follower, tmp_path) == []
    written.advance(1)
    assert [path.name for path in follow(follower, tmp_path)] == ["000000.000000008.anchor"]
    assert same_bits(held(follower), written.line[-1])


def test_a_restarted_publisher_begins_with_an_anchor(tmp_path: pathlib.Path) -> None:
    written = Written(tmp_path, anchor_every=100)
    written.advance(3)
    follower = Chain(RUN, 64, 3)
    follow(follower, tmp_path)
    written.outbox, written.chain = Outbox(tmp_path, RUN, 64, 100), make_chain(written.line[-1], version=Version(0, 2))
    written.advance(1)  # to the restarted one, 0.3 is a change against what it holds; its directory is new to it
    follow(follower, tmp_path)
    assert same_bits(held(follower), written.line[-1])


def test_a_new_history_leads_on_from_the_dead_one(tmp_path: pathlib.Path) -> None:
    written = Written(tmp_path, anchor_every=100)
    written.advance(4)
    follower = Chain(RUN, 64, 3)
    follow(follower, tmp_path)
    rolled_back = perturbed(written.line[1], written.rng, 0.1)
    written.chain.advance(anchor_parts(rolled_back, Version(1, 2)), written.outbox.write)
    written.outbox.settle(written.chain)
    written.outbox.flush()
    assert [path.name for path in follow(follower, tmp_path)] == ["000001.000000002.from.000000.000000003.update"]
    assert same_bits(held(follower), rolled_back)


def test_a_disk_that_refuses_costs_an_anchor_and_nothing_else(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Written(tmp_path, anchor_every=100)
    written.advance(2)
    follower = Chain(RUN, 64, 3)
    follow(follower, tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    written.advance(3)
    monkeypatch.undo()
    assert written.chain.version == Version(0, 4)
    assert follow(follower, tmp_path) == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    written.advance(1)
    assert [path.name for path in follow(follower, tmp_path)] == ["000000.000000005.anchor"]
    assert same_bits(held(follower), written.line[-1])


@LIGHT
@given(st.data())
def test_a_file_that_is_torn_or_damaged_is_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("updates")
    written = Written(path, anchor_every=100)
    written.advance(2)
    file = path / directory.file_name(FIRST, Version(0, 1), False)
    whole = file.read_bytes()
    if data.draw(st.booleans()):
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        flipped = bytes([whole[at] ^ data.draw(st.integers(1, 255))])
        file.write_bytes(whole[:at] + flipped + whole[at + 1 :])
    follower = make_chain(written.line[0])
    try:
        about, parts = load(file)
        follower.advance(parts)
    except WeightsError:
        assert follower.version == FIRST
    else:  # what the file says of itself is not covered by a checksum; the weights are
        assert same_bits(held(follower), written.line[-1])
        assert about is not None


def test_inspect_says_what_is_in_a_file(tmp_path: pathlib.Path) -> None:
    written = Written(tmp_path, anchor_every=100)
    written.advance(2)
    file = tmp_path / directory.file_name(FIRST, Version(0, 1), False)
    said = json.loads(CliRunner().invoke(weights, ["inspect", str(file), "--json"], catch_exceptions=False).output)
    old, new = written.line
    changed = sum(int((a.view(torch.int16) != new[n].view(torch.int16)).sum()) for n, a in old.items())
    # a piece that travels whole counts whole: here four elements, of which two changed
    assert (said["changed"], said["elements"]) == (changed + 2, written.chain.elements)
    assert said["bits_per_changed"] == pytest.approx(8 * said["payload_bytes"] / said["changed"])
    assert said["target_hash"] == hash_of(new) and said["code"] == "small"
    table = CliRunner().invoke(weights, ["inspect", str(file)], catch_exceptions=False).output
    assert "0.0 -> 0.1" in table and hash_of(new) in table and "small" in table
    anchor = tmp_path / directory.file_name(FIRST, FIRST, True)
    assert "all weights" in CliRunner().invoke(weights, ["inspect", str(anchor)], catch_exceptions=False).output


def test_a_file_that_is_no_update_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x").write_text("hello")
    with pytest.raises(WeightsError, match="is no update"):
        describe(tmp_path / "x")
    with pytest.raises(WeightsError, match="cannot read"):
        load(tmp_path / "nothing")
    assert following(tmp_path / "nowhere", None) is None


def in_parts(path: pathlib.Path) -> tuple[pathlib.Path, directory.About, list[UpdatePart]]:
    """A file of three parts."""
    written = Written(path)
    written.advance(2)
    file = path / directory.file_name(FIRST, Version(0, 1), False)
    about, [part] = load(file)
    parts = [sealed(part, part=i, parts=3) for i in range(3)]
    directory.save(file, about := replace(about, parts=3), parts)
    load(file)
    return file, about, parts


def sealed(part: UpdatePart, /, **changes: Any) -> UpdatePart:
    """Somebody who changes a part on purpose gets its checksum right."""
    changed = replace(part, **changes)
    return replace(changed, checksum=checksum(changed))


LIES: dict[str, Any] = {
    "the run": {"run": "other"},
    "the base": {"base": Version(0, 7)},
    "the target": {"target": Version(0, 9)},
    "the kind": {"anchor": True},
    "the fingerprint": {"target_hash": "0" * 16},
    "fewer parts": {"parts": 2},
    "more parts": {"parts": 1 << 60},
    "no parts": {"parts": 0},
    "less than none": {"parts": -1},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_is_not_what_it_says_of_itself_is_refused_by_name(tmp_path: pathlib.Path, lie: str) -> None:
    file, about, parts = in_parts(tmp_path)
    directory.save(file, replace(about, **LIES[lie]), parts)
    with pytest.raises(WeightsError, match=r"is damaged|is cut short"):
        load(file)


@pytest.mark.parametrize("order", [(0, 1), (0, 0, 2), (0, 2, 1), (0, 1, 2, 2)])
def test_parts_that_are_missing_twice_there_or_in_another_order_are_refused(
    tmp_path: pathlib.Path, order: tuple[int, ...]
) -> None:
    file, about, parts = in_parts(tmp_path)
    directory.save(file, replace(about, parts=len(order)), [parts[i] for i in order])
    with pytest.raises(WeightsError, match="is damaged"):
        load(file)


def test_a_file_of_no_parts_or_with_something_behind_them_is_refused(tmp_path: pathlib.Path) -> None:
    file, about, parts = in_parts(tmp_path)
    for number in (0, -1):
        directory.save(file, replace(about, parts=number), [])
        with pytest.raises(WeightsError, match="is damaged"):
            load(file)
    directory.save(file, about, parts)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(WeightsError, match="is damaged"):
        load(file)


def framed(body: bytes) -> bytes:
    return directory.MAGIC + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        directory.MAGIC,
        directory.MAGIC + b"\xff" * 4,
        framed(b""),
        framed(b"\x91" * 60_000),
        framed(b"\x81\xa1x" + b"\x91" * 60_000),
        framed(msgspec.msgpack.encode({"run": "r"})),
        framed(msgspec.msgpack.encode({"run": b"\xff\xfe"})),
    ],
)
def test_bytes_of_anybody_are_refused_by_name(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    for read in (describe, load):
        with pytest.raises(WeightsError, match=r"/x is (no update|damaged|cut short)"):
            read(tmp_path / "x")


def test_an_anchor_that_claims_more_than_it_has_is_refused_before_memory_is_taken(tmp_path: pathlib.Path) -> None:
    written = Written(tmp_path)
    written.advance()
    about, parts = load(tmp_path / directory.file_name(FIRST, FIRST, True))
    starts = [*parts[0].starts]
    starts[0] = SLICE << 17  # so many slices would be listed
    directory.save(tmp_path / "x", about, [sealed(parts[0], starts=starts), *parts[1:]])
    parts, chain = load(tmp_path / "x")[1], Chain(RUN, 64, 3)
    tracemalloc.start()
    with pytest.raises(WeightsError, match="has not all of"):
        chain.advance(parts)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 4 << 20


def test_only_files_with_our_names_are_seen(tmp_path: pathlib.Path) -> None:
    names = {place: directory.file_name(FIRST, Version(0, step), True) for step, place in enumerate("adpl")}
    (tmp_path / names["a"]).write_bytes(b"")
    (tmp_path / names["d"]).mkdir()
    os.mkfifo(tmp_path / names["p"])  # to open it would be to wait for ever
    (tmp_path / names["l"]).symlink_to(tmp_path / "nothing")
    for other in ("x", names["a"] + ".part", names["a"].replace("0", "\u0660")):
        (tmp_path / other).write_bytes(b"")
    assert [path.name for _, _, path in listing(tmp_path)] == [names["a"]]


def test_a_directory_that_cannot_be_read_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"cannot read .*/x: Not a directory"):
        listing(tmp_path / "x")
