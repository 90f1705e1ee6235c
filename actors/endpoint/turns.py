"""A turn of the model for a request: which tokens it follows, and what was said in it."""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Sequence

from actors.chat import ChatFormat
from actors.chat_parsing import Engines
from actors.chat_template import TemplateRefused
from actors.endpoint.answer import Answer, Ending
from actors.endpoint.asking import ApiError, Ask, refuse
from actors.endpoint.options import EndpointOptions
from actors.endpoint.sessions import Session, conversation
from actors.episodes import Branch, ContextFull, Episode, EpisodeEnded, Sampled
from stream_rl.errors import EngineError, StreamRLError
from stream_rl.types import Finish

LETTERS_IN_THE_LOOP = 20_000
"""Longer texts are tokenized in a thread: they take milliseconds, and every other session would wait for them."""


class Turns:
    """Shared by all sessions."""

    def __init__(self, chat: ChatFormat, engines: Engines, options: EndpointOptions, counts: Counter[str]) -> None:
        self._chat, self._engines, self._options, self._counts = chat, engines, options, counts

    async def take(self, episode: Episode, session: Session, ask: Ask) -> Answer:
        """Raises ApiError for all that can go wrong with it."""
        try:
            return await self._take(episode, session, ask)
        except ApiError:
            raise
        except EpisodeEnded as ended:
            raise ApiError(400, f"the episode has ended: {ended.reason}", code="episode_ended") from ended
        except ContextFull as full:
            raise too_long(str(full)) from full
        except TemplateRefused as refused:
            raise refuse(str(refused), "messages") from refused
        except (EngineError, TimeoutError) as error:
            self._counts["endpoint.engine_error"] += 1
            raise ApiError(500, f"no engine could answer: {error}", code="engine_error", retry=True) from error
        except StreamRLError as error:
            raise refuse(str(error)) from error
        except Exception as error:  # a request is data: its client hears of it, other sessions go on
            self._counts["endpoint.internal_error"] += 1
            raise ApiError(500, f"internal error: {type(error).__name__}: {error}", code="internal_error") from error

    async def count(self, session: Session, ask: Ask) -> int:
        """Tokens that the request's turn would follow.  Raises ApiError."""
        place, count, _ = session.find(conversation(ask))
        try:
            new = await self._tokens(ask, count, place.branch.token_ids[: place.tokens] if place else [])
        except TemplateRefused as refused:
            raise refuse(str(refused), "messages") from refused
        return len(new) + (place.tokens if place else 0)

    async def _take(self, episode: Episode, session: Session, ask: Ask) -> Answer:
        if ask.tools and not self._chat.parsing.tools:
            raise refuse("this run parses no tool calls; set agent.tool_parser in its recipe", "tools")
        if ask.stop and not self._options.stop_sequences:
            raise refuse("this run's engines know no text; set sglang.skip_tokenizer_init = false to use stop", "stop")
        digests = conversation(ask)
        turn = session.unparsed.pop(digests[-1], None)
        if turn is None:
            turn = await self._sample(episode, session, ask, digests)
        try:
            answer = await self._answer(ask, *turn)
        except (EngineError, TimeoutError):
            session.unparsed[digests[-1]] = turn
            raise
        session.note(digests, answer.said, turn[0])
        return answer

    async def _sample(
        self, episode: Episode, session: Session, ask: Ask, digests: Sequence[bytes]
    ) -> tuple[Branch, Sampled, int]:
        """The turn, the branch that it is on, and how many of the tokens before it were held."""
        place, count, goes_on = session.find(digests)
        branch = place.branch if place and goes_on else None
        if branch is not None:
            session.busy.add(branch)
        try:
            held = place.branch.token_ids[: place.tokens] if place and not branch else []
            new = await self._tokens(ask, count, branch.token_ids[-1:] if branch else held)
            self._counts[f"endpoint.{'continued' if branch else 'forked' if place else 'begun'}"] += 1
            taken, sampled = await episode.turn(branch, [*held, *new], max_new_tokens=ask.max_new_tokens, stop=ask.stop)
            return taken, sampled, place.tokens if place else 0
        finally:
            if branch is not None:
                session.busy.discard(branch)

    async def _tokens(self, ask: Ask, count: int, after: Sequence[int]) -> list[int]:
        """Of the messages from `count` on, behind those tokens; of all of them if there are none before."""
        new = ask.messages[count:]
        letters = sum(len(message["content"]) for message in new)
        least = letters // self._chat.longest_token
        if (most := self._options.max_context_tokens) and least > most:
            raise too_long(f"{least} tokens at least; a trajectory has {most} at most")

        def encode() -> list[int]:
            return self._chat.suffix(new, after) if count else self._chat.prompt(new, ask.tools)

        return encode() if letters < LETTERS_IN_THE_LOOP else await asyncio.to_thread(encode)

    async def _answer(self, ask: Ask, branch: Branch, sampled: Sampled, num_held: int) -> Answer:
        num_prompt = len(branch.token_ids) - len(sampled.token_ids)
        ending, sequence, cut = self._ending(ask, sampled)
        seed = f"{branch.group}/{branch.member}/{num_prompt}"
        tools = ask.tools if ask.call_tools else []
        said = await self._chat.parse(sampled.token_ids, tools, self._engines, seed, cut)
        if said.malformed:
            self._counts["endpoint.malformed_tool_call"] += 1
        shown = sampled.token_ids[:-1] if self._chat.ended(sampled.token_ids) else sampled.token_ids
        return Answer(
            id=hashlib.blake2b(seed.encode(), digest_size=12).hexdigest(),
            created=int(time.time()),
            said=said,
            ending=ending,
            stop_sequence=sequence,
            num_prompt=num_prompt,
            num_held=num_held,
            num_sampled=len(sampled.token_ids),
            pieces=tuple(self._chat.piece(token) for token in shown) if ask.logprobs else (),
            logprobs=tuple(sampled.logprobs[: len(shown)]) if ask.logprobs else (),
        )

    def _ending(self, ask: Ask, sampled: Sampled) -> tuple[Ending, str | None, str | None]:
        """(why it ended, the request's stop sequence that ended it, the text before that)."""
        if sampled.finish == Finish.LENGTH:
            asked = ask.max_new_tokens and len(sampled.token_ids) >= ask.max_new_tokens
            return (Ending.LENGTH if asked else Ending.CONTEXT), None, None
        if not ask.stop or self._chat.ended(sampled.token_ids):
            return Ending.STOP, None, None
        text = self._chat.decode(sampled.token_ids)
        found = [(text.index(one), one) for one in ask.stop if one in text]
        if not found:
            return Ending.STOP, None, None
        where, sequence = min(found)
        return Ending.STOP_SEQUENCE, sequence, text[:where]


def too_long(detail: str) -> ApiError:
    """In the words by which clients know that they have to compact."""
    return ApiError(
        400,
        f"prompt is too long: it exceeds this model's maximum context length: {detail}",
        code="context_length_exceeded",
        param="messages",
    )
