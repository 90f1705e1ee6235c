"""A model's chat template: Jinja, in a sandbox, with what transformers' `apply_chat_template` gives to one.

Written against jinja2 itself: transformers' module takes seconds to import and brings torch where there is one.
"""

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stream_rl.errors import ConfigError, StreamRLError

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class TemplateRefused(StreamRLError, ValueError):
    """The template does not take these messages; what it said is in the text."""


class ChatTemplate:
    """`render` is a function of its arguments, but for the day's date in templates that ask for it."""

    def __init__(self, source: str, special: Mapping[str, str] | None = None, name: str = "the chat template") -> None:
        """special: texts of bos_token and the like, for the template.  Raises ConfigError if it is no Jinja."""
        self.name, self._special = name, dict(special or {})
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{name} is no Jinja template: {error}") from error

    @classmethod
    def load(cls, model: str | pathlib.Path, override: str = "") -> "ChatTemplate":
        """That of the model in a directory, or of the file `override`.  Raises ConfigError if there is none."""
        model = pathlib.Path(model)
        config = _read_json(model / "tokenizer_config.json")
        special = {name: _token(value) for name in SPECIAL if (value := config.get(name))}
        if override or (model / "chat_template.jinja").is_file():
            path = pathlib.Path(override) if override else model / "chat_template.jinja"
            try:
                return cls(path.read_text(), special, str(path))
            except OSError as error:
                raise ConfigError(f"agent.chat_template: cannot read {path}: {error}") from error
        source = config.get("chat_template")
        if isinstance(source, list):  # several by name; "default" is the one that all requests may use
            source = {one.get("name"): one.get("template") for one in source}.get("default")
        if not isinstance(source, str):
            raise ConfigError(
                f"{model} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
                "messages need one: name a Jinja file in agent.chat_template"
            )
        return cls(source, special, f"the chat template of {model}")

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, generate: bool = True
    ) -> str:
        """The text of a conversation; with `generate`, up to where the model's next turn begins.

        Raises TemplateRefused with the template's own words, or those of whatever it stumbled over.
        """
        try:
            return self._template.render(
                messages=list(messages), tools=list(tools) or None, add_generation_prompt=generate, **self._special
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateRefused(f"{self.name} refuses these messages: {error}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what assistants say; the text is the same without."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it like this

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own writes HTML's escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _token(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value
