"""Checkpoints of a learner of any number of ranks: written beside training, whole or not at all; loaded by any other.

    training.json               what it is of, and the digest of every other file (resume.py)
    model*.safetensors, config.json, tokenizer...
    training/rank-*.safetensors each rank's shards of the training state (state_files.py)
    critic/...                  the same of another network

Each rank writes its own shards, and no tensor is gathered over the network: the first rank puts the whole weights of
the Hugging Face files together from the ranks' files.
"""

import contextlib
import dataclasses
import logging
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

from engines.megatron import core, resume
from engines.megatron.agreement import Peers
from engines.megatron.checkpoint import CheckpointTensors, replacing, sync, write_huggingface
from engines.megatron.shards import Assembly, Runs, Shard, shards, whole
from engines.megatron.snapshot import WEIGHT, Snapshot, Trained, snapshot
from engines.megatron.state_files import StateFiles, assembly, write_state
from engines.megatron.training_state import Loading, set_random_states, stepped
from stream_rl.types import Version

log = logging.getLogger(__name__)
_PIECES = "pieces"
"""The directory of the ranks' weights, until they are put together."""
Networks = Mapping[str, Trained]


class Saving:
    """A checkpoint under way: its snapshot is taken, and the rest is `finish`."""

    def __init__(
        self, directory: pathlib.Path, version: Version, run: str, networks: Networks, peers: Peers, placement: str
    ) -> None:
        """Made by all ranks between the same two steps."""
        self._directory, self._networks, self._peers = directory, networks, peers
        self._snapshots = {name: snapshot(trained) for name, trained in networks.items()}
        self._record = resume.Record(
            run=run,
            history=version.history,
            step=version.step,
            placement=placement,
            networks={name: trained.record() for name, trained in networks.items()},
            files={},
        )
        self.done = False
        """Whether `finish` came to an end, with or without an error."""

    def finish(self) -> None:
        """Write it, and return when it is durable, on all ranks.  Blocks: for a thread, one on each rank.

        Raises WeightsError if the disk of any rank refuses, EngineError if another rank is lost.
        """
        try:
            for taken in self._snapshots.values():
                taken.wait()
            with contextlib.ExitStack() as stack:
                leads = self._peers.rank == 0

                def begin() -> str:
                    return str(stack.enter_context(replacing(self._directory))) if leads else ""

                new = pathlib.Path(self._peers.exchange(self._peers.together(begin).encode())[0].decode())
                own = self._peers.together(lambda: self._write(new))
                said = self._peers.exchange(msgspec.json.encode(own))

                def complete() -> None:
                    if leads:
                        files = [msgspec.json.decode(each, type=resume.Files) for each in said]
                        self._complete(new, {name: each for theirs in files for name, each in theirs.items()})
                        stack.close()

                self._peers.together(complete)
        finally:
            for taken in self._snapshots.values():
                taken.forget()
            self._networks = {}
            self.done = True

    def release(self) -> None:
        """Let the optimizers' steps be.  For the thread that trains."""
        assert self.done, "the last checkpoint is still being written: `finish` it first"
        for taken in self._snapshots.values():
            taken.release()

    def _write(self, new: pathlib.Path) -> resume.Files:
        """What this rank keeps; returns its files."""
        rank = self._peers.rank
        written: list[pathlib.Path] = []
        for name, taken in self._snapshots.items():
            home = resume.home(new, name)
            state, pieces = home / resume.STATE, home / _PIECES
            state.mkdir(parents=True, exist_ok=True)
            write_state(state, rank, taken.held, taken.spend(), taken.random)
            written += state.glob(f"rank-{rank:05}*")
            if self._peers.size > 1:
                pieces.mkdir(exist_ok=True)
                weights = ((f"{WEIGHT}/{key}", tensor) for key, tensor in taken.weights.items())
                write_state(pieces, rank, taken.held, weights, {})
        if self._peers.size > 1:
            # the first rank will, too; but on a file system that several hosts share each has writes of its own
            for path in written:
                sync(path)
        return resume.digests(new, written)

    def _complete(self, new: pathlib.Path, files: resume.Files) -> None:
        """What is of all ranks: the whole weights, and the record."""
        for name, trained in self._networks.items():
            home = resume.home(new, name)
            with contextlib.ExitStack() as stack:
                parts: Snapshot | StateFiles = self._snapshots[name]
                if self._peers.size > 1:
                    parts = stack.enter_context(StateFiles(home / _PIECES))
                write_huggingface(home, _whole_weights(trained, parts), trained.source)
            shutil.rmtree(home / _PIECES, ignore_errors=True)
        theirs = [path for path in new.rglob("*") if path.is_file() and str(path.relative_to(new)) not in files]
        resume.seal(new, dataclasses.replace(self._record, files=files | resume.digests(new, theirs)))


class Checkpoints:
    """Of one learner.  For the thread that trains, on every rank at the same point."""

    def __init__(self, timeout_s: float) -> None:
        """timeout_s: longest wait for another rank to write or read its part."""
        # of their own, because a save speaks while training does
        self._peers = Peers(timeout_s)
        self._saving: Saving | None = None

    def begin(self, directory: pathlib.Path, version: Version, run: str, networks: Networks) -> Saving:
        """Take a snapshot; `finish` of what is returned writes it.  The one before it must be finished."""
        self._release()
        self._saving = Saving(directory, version, run, networks, self._peers, _placement())
        return self._saving

    def load(self, directory: pathlib.Path, networks: Networks) -> Version:
        """See `load`."""
        self._release()
        return load(directory, networks, self._peers, _placement())

    def _release(self) -> None:
        if self._saving is not None:
            self._saving.release()


def load(directory: pathlib.Path, networks: Networks, peers: Peers, placement: str) -> Version:
    """Be what the learner was that saved `directory`, on all ranks.  Returns the version that it saved.

    Raises WeightsError on all of them, before anything changes, if it is damaged or of another model or optimizer.
    """
    with contextlib.ExitStack() as stack:

        def check() -> _Found:
            ours = {name: trained.record() for name, trained in networks.items()}
            record = resume.check(directory, ours, peers.rank, peers.size)
            found = _Found(record)
            for name, trained in networks.items():
                home = resume.home(directory, name)
                files = stack.enter_context(StateFiles(home / resume.STATE))
                found.states.append(_state(trained, files))
                found.weights += _weights(trained, stack.enter_context(CheckpointTensors(home)))
                found.random = found.random or files.random(peers.rank)
            return found

        found = peers.together(check)
        for here, weights, parameter in found.weights:
            weights.onto(here, parameter)
        for state in found.states:
            state.apply()
    for name, trained in networks.items():
        trained.scheduler.num_steps = found.record.networks[name].schedule_steps
        trained.scheduler.step(increment=0)  # writes the groups' learning rate and weight decay
    if found.record.placement == placement and found.random:
        set_random_states(found.random)
    else:
        log.warning(
            "%s is of another placement (%s, here %s): its random states are of no use, and those of this start stay",
            directory, found.record.placement, placement,
        )  # fmt: skip
    return found.record.version


def _placement() -> str:
    state = core.parallel_state
    sizes = (
        state.get_tensor_model_parallel_world_size(),
        state.get_pipeline_model_parallel_world_size(),
        state.get_data_parallel_world_size(),
    )
    return "tensor {} x pipeline {} x data {}".format(*sizes)


@dataclass(slots=True)
class _Found:
    """A checkpoint that fits this rank, and is not loaded yet."""

    record: resume.Record
    states: list[Loading] = field(default_factory=list)
    weights: list[tuple[Runs, Assembly, Tensor]] = field(default_factory=list)
    random: dict[str, Tensor] = field(default_factory=dict)


def _state(trained: Trained, files: StateFiles) -> Loading:
    parts = stepped(trained.model, trained.optimizer)
    return Loading(parts, trained.holdings.held, files, trained.holdings.sizes)


def _weights(trained: Trained, weights: CheckpointTensors) -> Iterator[tuple[Runs, Assembly, Tensor]]:
    """How each parameter is put together."""
    for name, parameter in trained.model.named_parameters():
        flat = parameter.detach().view(-1)
        for shard in shards(trained.holdings.held[name], 0, len(flat)):
            yield shard.here, assembly(shard, flat.dtype, [weights.part(shard.name)], "the weights"), flat


def _whole_weights(trained: Trained, parts: Snapshot | StateFiles) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors, one at a time, from what the ranks hold of them."""
    dtype = getattr(torch, trained.shape.dtype)
    for name, size in trained.holdings.sizes.items():
        tensor = torch.empty(size, dtype=dtype)
        wanted = whole(tensor.numel())
        shard = Shard(name, tensor.numel(), wanted, wanted)
        assembly(shard, dtype, parts.parts(WEIGHT, name), "the weights").into(tensor.view(-1))
        yield name, tensor
