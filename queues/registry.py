"""Who takes part in the run: every engine, actor, learner, publisher and observer by name and incarnation."""

from collections.abc import Iterator
from dataclasses import dataclass

from queues.outgoing import JOURNAL
from queues.versions import Histories
from stream_rl.messages import Engines, Hello
from stream_rl.types import Version

ROLES = ("engine", "actor", "learner", "publisher", "observer")
MAX_PEERS = 4096
MAX_NAME = 64
LONGEST_TICK_S = 5.0
"""A longer time between two ticks means that this process itself was away; no peer is blamed for it."""


@dataclass(slots=True)
class Peer:
    role: str
    name: str
    incarnation: int
    pid: int
    address: str
    seen: float
    """Last sign of life."""
    next_sequence: int = 0
    """The first sequenced message not taken from this incarnation."""
    lost: bool = False
    """Silent for too long.  Only a later incarnation is welcome."""
    version: Version | None = None
    """Engines: the live weights, as last said."""
    joined: bool = False
    """Engines: it has had weights that are young enough to sample with."""
    drained: bool = False
    """Engines: nothing new is sent to it."""


class Registry:
    def __init__(self, run: str) -> None:
        self._run = run
        self.peers: dict[str, Peer] = {}
        self._usable: list[Peer] = []
        self._ticked = 0.0

    @property
    def usable(self) -> Engines:
        """The engines that take requests."""
        return Engines(
            names=[engine.name for engine in self._usable],
            addresses=[engine.address for engine in self._usable],
            incarnations=[engine.incarnation for engine in self._usable],
        )

    def refresh_usable(self, histories: Histories, max_age: int) -> bool:
        """True if other engines take requests than before.  One that joins late comes with the model's first weights:
        it is left alone until its own are at most `max_age` versions old."""
        for engine in self.living("engine"):
            if engine.version is not None and not engine.joined and histories.knows(engine.version):
                age = histories.last.step - histories.effective_step(*engine.version)
                engine.joined = age <= max_age
        usable = [engine for engine in self.living("engine") if engine.joined and not engine.drained]
        changed, self._usable = usable != self._usable, usable
        return changed

    def problem(self, hello: Hello) -> tuple[str, str] | None:
        """(reason, detail) why `hello` cannot be welcomed, or None."""
        known = self.peers.get(hello.name)
        if hello.run != self._run:
            return "other_run", f"this queue serves run {self._run!r}, {hello.name!r} came for {hello.run!r}"
        if hello.role not in ROLES:
            return "unknown_role", f"a role is one of {ROLES}, got {hello.role!r}"
        if not 0 < len(hello.name) <= MAX_NAME or hello.name == JOURNAL:
            return (
                "bad_name",
                f"a name has 1 to {MAX_NAME} characters and is not {JOURNAL!r}, got {hello.name[:MAX_NAME]!r}",
            )
        if known is None and len(self.peers) >= MAX_PEERS:
            return "too_many_peers", f"{MAX_PEERS} peers are registered"
        if known is not None and known.role != hello.role:
            return "role_changed", f"{hello.name} is a {known.role}, it came back as {hello.role}"
        if known is not None and hello.incarnation < known.incarnation:
            return "fenced", f"{hello.name} is at incarnation {known.incarnation}, this is {hello.incarnation}: exit"
        if known is not None and known.lost and hello.incarnation == known.incarnation:
            return "fenced", f"{hello.name} was silent for too long and is taken for lost: exit"
        return None

    def welcome(self, hello: Hello, now: float) -> tuple[Peer, bool]:
        """Register; the peer, and whether it is a new incarnation (or altogether new) rather than a reconnection."""
        known = self.peers.get(hello.name)
        if known is not None and known.incarnation == hello.incarnation:
            known.pid, known.address, known.seen = hello.pid, hello.address, now
            return known, False
        peer = Peer(hello.role, hello.name, hello.incarnation, hello.pid, hello.address, now)
        self.peers[hello.name] = peer
        return peer, True

    def observer(self, name: str, now: float) -> Peer:
        """An observer of whom nothing but its name is known."""
        return Peer("observer", name, 0, 0, "", now)

    def forget(self, name: str) -> None:
        """An observer that is gone."""
        if (peer := self.peers.get(name)) is not None and peer.role == "observer":
            del self.peers[name]

    def forget_observers(self) -> None:
        """None of them is connected to a process that has just started."""
        self.peers = {name: peer for name, peer in self.peers.items() if peer.role != "observer"}

    def silent(self, now: float, silence_s: float) -> list[Peer]:
        """Peers of the run that have shown no sign of life for so long and are not lost yet.  Asked at each tick."""
        if now - self._ticked > LONGEST_TICK_S:
            self.forgive(now)
        self._ticked = now
        peers = self.peers.values()
        return [p for p in peers if p.role != "observer" and not p.lost and now - p.seen > silence_s]

    def forgive(self, now: float) -> None:
        """Nobody could have been heard until `now`."""
        for peer in self.peers.values():
            peer.seen = now

    def living(self, role: str) -> Iterator[Peer]:
        return (peer for peer in self.of_role(role) if not peer.lost)

    def of_role(self, role: str) -> Iterator[Peer]:
        return (peer for peer in self.peers.values() if peer.role == role)
