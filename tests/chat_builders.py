"""Chat templates and tokenizers of the kinds that models have."""

import json
import pathlib
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from actors.chat import ChatFormat
from actors.chat_parsing import Parsing
from actors.chat_template import ChatTemplate

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")

CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{%- endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- set f = call.function %}
            {{- '<tool_call>{"name": ' + f.name | tojson + ', "arguments": ' + f.arguments | tojson + '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>' + message.content + '</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

FORGETFUL = """
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<|im_start|>assistant\\n<think>' + (message.reasoning_content or '') + '</think>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1] }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""Reasoning stays in the text only behind the last user's message."""

STRICT = """
{%- set ns = namespace(ids=[]) %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if message.tool_call_id not in ns.ids %}{{- raise_exception('nobody called ' + message.tool_call_id) }}
        {%- elif message.tool_call_id | length != 9 %}{{- raise_exception('ids have 9 letters') }}{%- endif %}
        {{- '[RESULT]' + message.content }}
    {%- elif message.role == 'user' %}
        {%- if tools and loop.last %}{{- '[TOOLS]' + tools | tojson }}{%- endif %}
        {{- '[INST]' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- set ns.ids = ns.ids + [call.id] %}
            {{- '[CALL]' + call.function.arguments | tojson }}
        {%- endfor %}
        {{- eos_token }}
    {%- else %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
{%- endfor %}
"""
"""Results need their calls, tools stand before the last user's message, and nothing begins the model's turn."""

ONE_AT_A_TIME = """
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {{- '<|im_start|>assistant\\n' + message.tool_calls[0].function.arguments | tojson }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content }}{%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' }}
"""

COUNTING = """
{%- for message in messages %}{{- loop.index ~ ': ' + message.content + '<|im_end|>' }}{%- endfor %}
"""


def tokenizer(*, merges: bool = False, lowercase: bool = False) -> Tokenizer:
    """Bytes; with merges, what was sampled byte by byte is encoded as other tokens; in lower case, as another text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("a", "b"), ("ab", "c"), ("e", "Ġ"), ("o", "k"), ("n", "o"), ("t", "h"), ("th", "e")] if merges else []
    vocab = {letter: i for i, letter in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if lowercase:
        made.normalizer = normalizers.Lowercase()
    made.add_special_tokens([AddedToken(text, normalized=False) for text in (PAD, START, END)])
    made.add_tokens([AddedToken(text, normalized=False) for text in MARKERS])
    return made


def chat(
    template: str = CHATML, *, tools: str = "qwen25", reasoning: str = "", merges: bool = False, lowercase: bool = False
) -> ChatFormat:
    made = tokenizer(merges=merges, lowercase=lowercase)
    special = {"eos_token": END}
    stop = [made.token_to_id(END)]
    return ChatFormat(ChatTemplate(template, special), made, stop, Parsing(tools=tools, reasoning=reasoning))


def write_into(model: pathlib.Path, template: str = CHATML, **kind: Any) -> Tokenizer:
    """In place of a tiny model's tokenizer, which is no larger: the ids of both are below its vocabulary's size."""
    made = tokenizer(**kind)
    made.save(str(model / "tokenizer.json"))
    ids = {"eos_token_id": made.token_to_id(END), "pad_token_id": made.token_to_id(PAD), "bos_token_id": None}
    for name in ("config.json", "generation_config.json"):
        value = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(value | ids))
    kinds = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD}
    (model / "tokenizer_config.json").write_text(json.dumps({**kinds, "clean_up_tokenization_spaces": False}))
    (model / "chat_template.jinja").write_text(template)
    return made
