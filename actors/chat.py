"""Messages to token ids, turn by turn, and token ids to what was said.

A conversation is one token sequence: a prompt, the model's turn as it was sampled, a suffix for what came next, the
next turn, ...  What is new is tokenized once, and nothing that was sampled is ever decoded and encoded again.

The suffix does not depend on what was said before it: the template renders a stand-in conversation with the new
messages behind it, and what it writes behind the stand-in's last word is the suffix.  So a template that rewrites
earlier turns (Qwen3 drops their reasoning, Mistral moves the tools) does no harm: earlier turns stay as the model had
them.  One whose text of a message depends on how many came before is refused at the start.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from actors.chat_parsing import Engines, Parsing, Said, parsed_arguments
from actors.chat_template import ChatTemplate, TemplateRefused
from engines.megatron.model_shape import read_model_shape
from stream_rl import config
from stream_rl.episode import Message
from stream_rl.errors import ConfigError

Tool = Mapping[str, Any]
"""As in OpenAI's chat completions: {"type": "function", "function": {"name", "description", "parameters"}}."""
ID_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ID_LETTERS = 9
"""Of a tool call's id: what Mistral's templates ask for, and any other takes."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, for who asks for log-probs."""

    text: str
    utf8: bytes


class ChatFormat:
    """The chat template and the tokenizer of one model."""

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, stop_ids: Sequence[int], parsing: Parsing | None = None
    ) -> None:
        """stop_ids: tokens at which the engine ends a turn; the last one stays in the turn.

        Raises ConfigError if the template cannot be used turn by turn.
        """
        self._template, self._tokenizer, self._stop_ids = template, tokenizer, frozenset(stop_ids)
        self.parsing = parsing or Parsing()
        self._stop_texts = {text: i for i in stop_ids if (text := tokenizer.id_to_token(i))}
        self._bytes = _byte_alphabet() if '"ByteLevel"' in tokenizer.to_str()[-20_000:] else {}
        self.longest_token = max((len(text) for text in tokenizer.get_vocab()), default=1)
        """Characters; so a text has at least len(text) / longest_token tokens."""
        self._check()

    @classmethod
    def load(cls, recipe: config.Recipe) -> "ChatFormat":
        """Raises ConfigError if the recipe's model has no template, or none that can be used turn by turn."""
        stop = {*read_model_shape(recipe.model.path).eos_token_ids, *recipe.rollout.sampling.get("stop_token_ids", ())}
        return cls(
            ChatTemplate.load(recipe.model.path, recipe.agent.chat_template),
            Tokenizer.from_file(f"{recipe.model.path}/tokenizer.json"),
            sorted(stop),
            Parsing(tools=recipe.agent.tool_parser, reasoning=recipe.agent.reasoning_parser),
        )

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids of a conversation, up to where the model's turn begins.  Raises TemplateRefused."""
        return self._encode(self._template.render([_for_template(one) for one in messages], tools))

    def suffix(self, messages: Sequence[Message], after: Sequence[int]) -> list[int]:
        """Token ids of new messages behind the tokens `after`, which end in a turn of the model, up to where its next
        turn begins.  The token that ends a turn is among them if it was not sampled.  Raises TemplateRefused.
        """
        end, behind = self._behind_turn([_for_template(one) for one in messages])
        ids = self._encode(end + behind)  # one text, so that a tokenizer sees what is before a word
        if not end or not after or after[-1] not in self._stop_ids:
            return ids
        return ids[1:]

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of a turn, without the token that ended it; with `special`, special tokens are written out."""
        ids = list(token_ids[:-1] if self.ended(token_ids) else token_ids)
        text: str = self._tokenizer.decode(ids, skip_special_tokens=not special)
        return text

    def ended(self, token_ids: Sequence[int]) -> bool:
        """Whether the last token is one that ends a turn."""
        return bool(token_ids) and token_ids[-1] in self._stop_ids

    async def parse(
        self, token_ids: Sequence[int], tools: Sequence[Tool], engines: Engines, seed: str, cut: str | None = None
    ) -> Said:
        """What the model said in a turn of these tokens.

        seed: names the turn; the ids of its tool calls are made from it.
        cut: a text to parse in place of theirs, which a stop sequence has ended early.

        Raises what the engines raise, and TimeoutError.
        """
        plain = cut if cut is not None else self.decode(token_ids)
        if not (self.parsing.reasoning or (self.parsing.tools and tools)):
            return Said(text=plain)
        # parsers look for markers that may be special tokens
        written = cut if cut is not None else self.decode(token_ids, special=True)
        return await self.parsing.parse(written, plain, tools, engines, lambda number: call_id(seed, number))

    def piece(self, token_id: int) -> Piece:
        """One token.  A byte-level one may be a part of a character."""
        name = self._tokenizer.id_to_token(token_id)
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if name and self._bytes and all(letter in self._bytes for letter in name):
            return Piece(text, bytes(self._bytes[letter] for letter in name))
        return Piece(text, text.encode())

    def _encode(self, text: str) -> list[int]:
        # the template writes the special tokens itself.  Of all ways to encode, this one lets other threads run.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def _behind_turn(self, messages: Sequence[Message], rounds: int = 1) -> tuple[str, str]:
        """(the text of the token that ends the model's turn, or "", what is behind it) before and with `messages`.

        rounds: of the stand-in conversation; it must not matter.
        """
        mark = _absent_from(messages)
        answer: dict[str, Any] = {"role": "assistant", "content": mark}
        if calls := [_call(message, mark) for message in _leading_results(messages)]:
            answer["tool_calls"] = calls
        before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}] * (rounds - 1)
        before.append({"role": "user", "content": "-"})
        try:
            text = self._template.render([*before, answer, *messages])
        except TemplateRefused as refused:
            try:  # some take one call at a time, and results of none
                text = self._template.render([*before, {"role": "assistant", "content": mark}, *messages])
            except TemplateRefused:
                raise refused from None
        _, found, behind = text.rpartition(mark)
        if not found:
            raise TemplateRefused(f"{self._template.name} does not write what an assistant said")
        where, stop = min(((behind.find(text), text) for text in self._stop_texts if text in behind), default=(0, ""))
        return stop, behind[where + len(stop) :]

    def _check(self) -> None:
        """Once, at the start: what `suffix` relies on."""
        news = [{"role": "user", "content": "what-is-new"}]
        try:
            first = self._behind_turn(news)
            later = self._behind_turn(news, 3) if "what-is-new" in first[1] else first
        except TemplateRefused as error:
            raise ConfigError(f"a conversation of user and assistant cannot be rendered: {error}") from error
        if "what-is-new" not in first[1]:
            raise ConfigError(
                f"{self._template.name} does not write a new message behind the earlier ones; it cannot be used turn "
                "by turn: give another in agent.chat_template"
            )
        if first != later:
            raise ConfigError(
                f"{self._template.name} is not prefix-stable: it writes the same message as {first[1]!r} in the second "
                f"round and as {later[1]!r} in the fourth; give another in agent.chat_template"
            )


def call_id(seed: str, number: int) -> str:
    """The same for the same turn, whenever it is parsed."""
    value = int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest())
    letters = []
    for _ in range(ID_LETTERS):
        value, letter = divmod(value, len(ID_ALPHABET))
        letters.append(ID_ALPHABET[letter])
    return "".join(letters)


def _leading_results(messages: Sequence[Message]) -> list[Message]:
    """Results of the last turn's tool calls: some templates refuse those that nobody called for."""
    for count, message in enumerate(messages):
        if message["role"] != "tool":
            return list(messages[:count])
    return list(messages)


def _call(result: Message, mark: str) -> dict[str, Any]:
    function = {"name": result.get("name") or "tool", "arguments": {"mark": mark}}
    return {"id": result.get("tool_call_id") or "000000000", "type": "function", "function": function}


def _for_template(message: Message) -> Message:
    """Arguments of tool calls as objects: templates write their JSON themselves.  Raises TemplateRefused for what is no
    message: a task may say anything."""
    if not isinstance(message.get("role"), str):
        raise TemplateRefused(f"a message needs a role, got {message!r:.100}")
    if not message.get("tool_calls"):
        return message
    calls = []
    try:
        for call in message["tool_calls"]:
            function = dict(call["function"])
            parsed = parsed_arguments(function["arguments"])
            calls.append({**call, "function": {**function, "arguments": parsed}})
    except (LookupError, TypeError, ValueError) as error:
        made = message["tool_calls"]
        raise TemplateRefused(f"tool calls need a function with its name and arguments, got {made!r:.100}") from error
    return {**message, "tool_calls": calls}


def _absent_from(messages: Sequence[Message]) -> str:
    text, mark = repr(messages), "what-was-said"
    while mark in text:
        mark += "-and-more"
    return mark


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's letter of each byte: printable ones stand for themselves, the others for letters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
