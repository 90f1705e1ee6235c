"""Who takes part in the run: every engine, actor, learner, publisher and observer by name and incarnation."""

from collections.abc import Iterator
from dataclasses import dataclass

from stream_rl.messages import Hello
from stream_rl.types import Version

ROLES = ("engine", "actor", "learner", "publisher", "observer")
MAX_PEERS = 4096
MAX_NAME = 64


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
    """Engines: the first chunk message not taken from this incarnation."""
    version: Version | None = None
    """Engines: the live weights, as last said."""


class Registry:
    def __init__(self, run: str) -> None:
        self._run = run
        self.peers: dict[str, Peer] = {}

    def problem(self, hello: Hello) -> tuple[str, str] | None:
        """(reason, detail) why `hello` cannot be welcomed, or None."""
        known = self.peers.get(hello.name)
        if hello.run != self._run:
            return "other_run", f"this queue serves run {self._run!r}, {hello.name!r} came for {hello.run!r}"
        if hello.role not in ROLES:
            return "unknown_role", f"a role is one of {ROLES}, got {hello.role!r}"
        if not 0 < len(hello.name) <= MAX_NAME:
            return "bad_name", f"a name has 1 to {MAX_NAME} characters, got {len(hello.name)}"
        if known is None and len(self.peers) >= MAX_PEERS:
            return "too_many_peers", f"{MAX_PEERS} peers are registered"
        if known is not None and known.role != hello.role:
            return "role_changed", f"{hello.name} is a {known.role}, it came back as {hello.role}"
        if known is not None and hello.incarnation < known.incarnation:
            return "fenced", f"{hello.name} is at incarnation {known.incarnation}, this is {hello.incarnation}: exit"
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

    def forget(self, name: str) -> None:
        """An observer that is gone."""
        if (peer := self.peers.get(name)) is not None and peer.role == "observer":
            del self.peers[name]

    def of_role(self, role: str) -> Iterator[Peer]:
        return (peer for peer in self.peers.values() if peer.role == role)
