"""What was asked and answered in each episode: which branch a request continues, and which was asked before.

A branch goes on with a request whose messages are those that were asked and answered on it, and more.  Messages are
compared as they are: what the user, a tool or the system said exactly, what the model said by its text (white space
around it left out) and its tool calls (by name and arguments).  Its reasoning and the ids of its calls do not count:
clients drop or rename them.  Anything else begins a branch: an edited history, a compacted one, other tools, another
system prompt, and a request while its branch is in a turn.  What such a branch shares with an earlier one up to the end
of a turn it has in the same tokens; the rest is rendered.
"""

import asyncio
import hashlib
import weakref
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from actors.chat_parsing import Said, parsed_arguments
from actors.endpoint.answer import Answer
from actors.endpoint.asking import Ask
from actors.episodes import Branch, Episode, Sampled

KEPT = 64
"""Answers of an episode that are kept for who asks again, and conversations that may be named.  SDKs ask again within
seconds; what is asked for later is sampled anew."""


class Place(NamedTuple):
    """The end of a turn."""

    branch: Branch
    tokens: int
    """Of the branch, the turn's included."""


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and its answer."""

    body: bytes
    """Digest of the request."""
    idempotency_key: str | None
    ask: Ask
    answer: asyncio.Future[Answer]
    client_gone: bool = False
    """Nobody waits for it (any more)."""


@dataclass(slots=True, eq=False)
class Session:
    """One episode's."""

    places: dict[bytes, list[Place]] = field(default_factory=lambda: defaultdict(list))
    """By the digest of the conversation up to there.  Not more of them than turns."""
    busy: set[Branch] = field(default_factory=set)
    unparsed: dict[bytes, tuple[Branch, Sampled, int]] = field(default_factory=dict)
    """Turns that no engine could parse, as they were sampled, by the digest of what was asked: who asks again gets
    them, for they train."""
    exchanges: deque[Exchange] = field(default_factory=deque)
    """Those under way and the newest of the others, in the order of asking."""
    stored: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Conversations by the id of their last answer."""

    @property
    def num_open(self) -> int:
        return sum(not exchange.answer.done() for exchange in self.exchanges)

    def asked_before(self, body: bytes, idempotency_key: str | None, retry: bool) -> Exchange | None:
        """The exchange that a request repeats, if it is no new one.

        An idempotency key says so; a retry of an SDK is that of the newest with this body, one whose client is gone
        before others; and one whose client is gone in mid-turn is taken up by whoever sends its body again.
        """
        if idempotency_key is not None:
            return next((one for one in self.exchanges if one.idempotency_key == idempotency_key), None)
        same = [one for one in reversed(self.exchanges) if one.body == body]
        gone = [one for one in same if one.client_gone]
        if retry:
            return next(iter([*gone, *same]), None)
        return next((one for one in gone if not one.answer.done()), None)

    def begin(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        done = [one for one in self.exchanges if one.answer.done()]
        for old in done[: max(0, len(done) - KEPT)]:
            self.exchanges.remove(old)

    def forget(self, exchange: Exchange) -> None:
        """It came to an error: who asks again asks anew."""
        if exchange in self.exchanges:
            self.exchanges.remove(exchange)

    def find(self, digests: Sequence[bytes]) -> tuple[Place | None, int, bool]:
        """(the end of the last turn that a conversation has in common with a branch, messages up to there, whether
        that branch may go on from there).  digests: as `conversation` gives them."""
        for count in range(len(digests) - 2, 0, -1):  # one message at least is new
            if places := self.places.get(digests[count]):
                for place in reversed(places):
                    if place.tokens == len(place.branch.token_ids) and place.branch not in self.busy:
                        return place, count, True
                return places[-1], count, False
        return None, 0, False

    def note(self, digests: Sequence[bytes], said: Said, branch: Branch) -> None:
        """A turn ended, which answered this conversation."""
        self.places[extended(digests[-1], answered(said))].append(Place(branch, len(branch.token_ids)))

    def store(self, name: str, ask: Ask, said: Said) -> None:
        self.stored[name] = [*ask.messages[ask.opening :], answered(said)]
        if len(self.stored) > KEPT:
            del self.stored[next(iter(self.stored))]


class Sessions:
    """By episode; one ends with its episode, because nothing else holds it."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[Episode, Session] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._of)

    def of(self, episode: Episode) -> Session:
        session = self._of.get(episode)
        if session is None:
            session = self._of[episode] = Session()
        return session


def conversation(ask: Ask) -> list[bytes]:
    """[messages + 1] digest of what is before each message, and of all of them."""
    digests = [_digest(b"", ask.tools)]
    for message in ask.messages:
        digests.append(extended(digests[-1], message))
    return digests


def extended(digest: bytes, message: Mapping[str, Any]) -> bytes:
    if message["role"] != "assistant":
        return _digest(digest, [message["role"], message["content"]])
    calls = [
        [call["function"]["name"], parsed_arguments(call["function"]["arguments"])]
        for call in message.get("tool_calls", ())
    ]
    return _digest(digest, ["assistant", message["content"].strip(), calls])


def answered(said: Said) -> dict[str, Any]:
    """What the model said, as a message of the conversation."""
    message: dict[str, Any] = {"role": "assistant", "content": said.text}
    if said.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in said.tool_calls
        ]
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    return message


def _digest(before: bytes, value: Any) -> bytes:
    return hashlib.blake2b(before + msgspec.json.encode(value, order="sorted"), digest_size=16).digest()
