"""Messages become tokens once, behind tokens that stay as they were sampled."""

import asyncio
import json
import pathlib
from typing import Any

import pytest
from chat_builders import CHATML, COUNTING, END, FORGETFUL, ONE_AT_A_TIME, START, STRICT, chat, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.chat import ChatFormat, call_id
from actors.chat_parsing import Said
from actors.chat_template import ChatTemplate, TemplateRefused
from engines.sglang.client import EngineUnreachable
from stream_rl.episode import ToolCall
from stream_rl.errors import ConfigError, EngineError

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20).filter(
    lambda text: "<|" not in text and "<t" not in text and "</t" not in text
)
TOOLS = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | ({"tool_calls": list(calls)} if calls else {})


def call(name: str, arguments: str, id: str = "abcdefghi") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: str, id: str = "abcdefghi") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": text}


def sampled(text: str, made: ChatFormat) -> list[int]:
    """A turn that ended by itself."""
    return made._encode(text + END)


# -- suffixes ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), TEXT, st.booleans())
def test_turn_by_turn_gives_the_tokens_of_the_whole_conversation(
    rounds: list[tuple[str, str]], last: str, with_tools: bool
) -> None:
    made, tools = CHAT, TOOLS if with_tools else []
    messages, tokens = [], []
    for question, answer in rounds:
        messages.append(user(question))
        tokens += made.suffix([user(question)], tokens) if tokens else made.prompt(messages, tools)
        messages.append(said(answer))
        tokens += sampled(answer, made)
    messages.append(user(last))
    assert tokens + made.suffix([user(last)], tokens) == made.prompt(messages, tools)


CHAT = chat()


def test_a_turn_that_was_cut_is_ended_by_the_suffix() -> None:
    made = chat()
    end = made._encode(END)
    ended, cut = sampled("hello", made), sampled("hello", made)[:-1]
    assert cut + made.suffix([user("on")], cut) == ended + made.suffix([user("on")], ended)
    assert made.suffix([user("on")], cut)[:1] == end
    assert made._tokenizer.decode(made.suffix([user("on")], ended), skip_special_tokens=False) == (
        f"\n{START}user\non{END}\n{START}assistant\n"
    )


def test_results_of_parallel_calls_are_one_suffix() -> None:
    made = chat()
    calls = '<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'
    call_both = [call("add", '{"x": 1}'), call("add", '{"x": 1}', "second123")]
    tokens = made.prompt([user("both")], TOOLS) + sampled(calls + calls, made)
    tokens += made.suffix([result("1"), result("2", "second123"), user("so?")], tokens)
    whole = [user("both"), said("", *call_both), result("1"), result("2", "second123"), user("so?")]
    assert tokens == made.prompt(whole, TOOLS)


def test_a_template_that_rewrites_earlier_turns_leaves_them_as_they_were() -> None:
    made = chat(FORGETFUL)
    tokens = made.prompt([user("a")]) + sampled("<think>long thoughts</think>b", made)
    tokens += made.suffix([user("c")], tokens)
    text = made._tokenizer.decode(tokens, skip_special_tokens=False)
    assert "long thoughts" in text and text.endswith(f"b{END}\n{START}user\nc{END}\n{START}assistant\n")
    assert "long thoughts" not in made._template.render([user("a"), said("<think>long thoughts</think>b"), user("c")])


def test_a_template_that_wants_the_calls_of_results_gets_stand_ins() -> None:
    made = chat(STRICT)
    behind = made.suffix([result("3"), result("4", "123456789"), user("and?")], sampled("[CALL]{}", made))
    assert made._tokenizer.decode(behind) == "[RESULT]3[RESULT]4[INST]and?"
    with pytest.raises(TemplateRefused, match="ids have 9 letters"):
        made.suffix([result("3", "short")], [])
    with pytest.raises(TemplateRefused, match="nobody called"):
        made.prompt([user("a"), result("3")])
    # tools stay where the first prompt has them
    assert "[TOOLS]" not in made._tokenizer.decode(made.suffix([user("b")], sampled("a", made)))


def test_a_template_of_one_call_at_a_time_takes_the_results_of_two() -> None:
    made = chat(ONE_AT_A_TIME)
    behind = made.suffix([result("3"), result("4", "123456789")], sampled("x", made))
    roles = [f"{START}tool\n3{END}", f"{START}tool\n4{END}", f"{START}assistant\n"]
    assert made._tokenizer.decode(behind, skip_special_tokens=False) == "".join(roles)


@settings(deadline=None, max_examples=30)
@given(TEXT)
def test_what_is_said_cannot_pass_for_the_stand_in(text: str) -> None:
    made = CHAT
    hostile = text + "what-was-said" + text + "what-was-said-and-more"
    tokens = made.suffix([user(hostile)], sampled("x", made))
    assert hostile in made._tokenizer.decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (COUNTING, "is not prefix-stable: it writes the same message as"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "does not write"),
        ("{{ messages[0].content }}{{ messages[1].content }}", "does not write a new message behind"),
        ("{{ raise_exception('never') }}", "cannot be rendered: .*never"),
        ("{{ messages.nothing.here }}", "cannot be rendered"),
        ("{% if %}", "no Jinja template"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_at_the_start(template: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        chat(template)


# -- templates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        FORGETFUL,
        " {% for m in messages %}\n {{ m | tojson(indent=2) }}\n {% if loop.last %}{% break %}{% endif %}{% endfor %}",
        "{{ bos_token }}{% generation %}{{ messages[0].content }}{% endgeneration %} {{ tools | tojson }}",
        "{{ messages | map(attribute='content') | join('é') }}{{ strftime_now('%Y') }}",
    ],
)  # fmt: skip
def test_templates_render_as_transformers_has_them(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [user("a <b> é"), said("c"), user('d"\n')]
    special = {"bos_token": "<s>"}
    [expected], _ = render_jinja_template([messages], TOOLS, None, template, add_generation_prompt=True, **special)
    assert ChatTemplate(template, special).render(messages, TOOLS) == expected


def test_where_a_models_template_is(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"no chat template .* agent\.chat_template"):
        ChatTemplate.load(tmp_path)
    config = {"eos_token": {"content": "</s>"}, "chat_template": [{"name": "default", "template": "A{{ eos_token }}"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.load(tmp_path).render([]) == "A</s>"
    (tmp_path / "chat_template.jinja").write_text("B{{ eos_token }}")
    assert ChatTemplate.load(tmp_path).render([]) == "B</s>"
    (tmp_path / "mine.jinja").write_text("C")
    assert ChatTemplate.load(tmp_path, str(tmp_path / "mine.jinja")).render([]) == "C"
    with pytest.raises(ConfigError, match="cannot read"):
        ChatTemplate.load(tmp_path, str(tmp_path / "nowhere.jinja"))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ConfigError, match="cannot read"):
        ChatTemplate.load(tmp_path)


# -- tokens to text ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), max_size=40))
def test_pieces_have_the_bytes_that_were_sampled(ids: list[int]) -> None:
    pieces = [CHAT.piece(token) for token in ids]
    text = b"".join(piece.utf8 for piece in pieces).decode(errors="replace")
    assert text == tokenizer().decode(ids)


def test_decode_leaves_out_only_the_token_that_ended_the_turn() -> None:
    made = chat()
    ids = made._encode(f"a<think>{START}b{END}")
    assert made.decode(ids) == "a<think>b"
    assert made.decode(ids, special=True) == f"a<think>{START}b"
    assert made.ended(ids) and not made.ended(ids[:-1]) and not made.ended([])


def test_ids_of_calls_are_those_of_their_turn() -> None:
    ids = [call_id(f"{turn}", number) for turn in range(50) for number in range(3)]
    assert len(set(ids)) == len(ids)
    assert ids[4] == call_id("1", 1)
    assert all(len(one) == 9 and one.isalnum() and one.isascii() for one in ids)


# -- parsing -------------------------------------------------------------------------------------------------


class Parser:
    """An engine's parsers, as the test has them."""

    def __init__(self, calls: list[tuple[str, str]], normal: str, unreachable: int = 0) -> None:
        self.calls, self.normal, self.unreachable = calls, normal, unreachable
        self.doubted = 0
        self.asked: list[Any] = []

    async def pick(self) -> Any:
        return self

    async def doubt(self, client: Any) -> None:
        self.doubted += 1

    async def parse_function_call(self, text: str, tools: Any, parser: str) -> dict[str, Any]:
        if self.doubted < self.unreachable:
            raise EngineUnreachable("gone")
        self.asked.append((text, tools, parser))
        calls = [{"name": name, "parameters": arguments, "tool_index": 0} for name, arguments in self.calls]
        return {"normal_text": self.normal, "calls": calls}

    async def separate_reasoning(self, text: str, parser: str) -> dict[str, Any]:
        reasoning, _, rest = text.rpartition("</think>")
        return {"reasoning_text": reasoning.removeprefix("<think>"), "text": rest}


def parse(text: str, parser: Any, tools: Any = TOOLS, **format: Any) -> Said:
    made = chat(**format)
    return asyncio.run(made.parse(sampled(text, made), tools, parser, "seed"))


def test_calls_and_reasoning_are_parts_of_what_was_said() -> None:
    parser = Parser([("add", '{"x": 1}')], "so: ", unreachable=2)
    expected = ToolCall(id=call_id("seed", 0), name="add", arguments='{"x": 1}')
    assert parse("<think>hm</think>so: <tool_call>...", parser, reasoning="qwen3") == Said(
        text="so: ", reasoning="hm", tool_calls=(expected,)
    )
    assert parser.asked == [("so: <tool_call>...", TOOLS, "qwen25")] and parser.doubted == 2


@pytest.mark.parametrize(
    ("calls", "normal"),
    [([], ""), ([("add", "{")], ""), ([("add", "[1]")], ""), ([("add", "{}"), ("add", "null")], "")],
)
def test_a_call_that_is_none_is_text_and_said_to_be_malformed(calls: list[tuple[str, str]], normal: str) -> None:
    assert parse("<tool_call>{", Parser(calls, normal)) == Said(text="<tool_call>{", malformed=True)


def test_what_no_wire_carries_becomes_text_that_it_does() -> None:
    """A model may write half of a surrogate pair as JSON's escape, and nest its arguments deeper than JSON is read."""
    said = parse("<tool_call>", Parser([("a\ud800", '{"x": "\udfff"}')], "so \ud800"))
    assert (said.text, said.tool_calls[0].name, said.tool_calls[0].arguments) == ("so ?", "a?", '{"x": "?"}')
    assert parse("<tool_call>{", Parser([("add", "[" * 100_000)], "")).malformed
    nameless: list[Any] = [("add", "{}"), (None, "{}")]
    assert parse("<tool_call>{", Parser(nameless, "")) == Said(text="<tool_call>{", malformed=True)


@pytest.mark.parametrize(
    "message",
    [
        {"content": "no role"},
        {"role": 5},
        {"role": "assistant", "content": "", "tool_calls": 3},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": 7}]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]},
        {"role": "user", "content": None},
    ],
)
def test_what_is_no_message_is_refused(message: dict[str, Any]) -> None:
    for render in (CHAT.prompt, lambda messages: CHAT.suffix(messages, [1])):
        with pytest.raises(TemplateRefused):
            render([message])


def test_a_format_that_no_engine_knows_is_an_error_that_names_it() -> None:
    parser = Parser([], "", unreachable=99)
    with pytest.raises(EngineError, match=r"agent\.tool_parser = 'qwen25'"):
        parse("<tool_call>", parser)
    assert parser.doubted == 5


def test_text_without_calls_is_text() -> None:
    assert parse(f"a{START}b", Parser([], f"a{START}b")) == Said(text="ab")
    assert parse("<tool_call>", None, tools=[]) == Said(text="<tool_call>")
    assert parse("<tool_call>", None, tools="") == Said(text="<tool_call>")
