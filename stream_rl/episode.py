"""What a user writes for a task of many turns: one coroutine in one small class.

    class Guess:
        def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
            ...

        async def play(self, prompt: Prompt, model: Model) -> float:
            turn = await model.turn()
            for _ in range(10):
                if turn.text == prompt.data["secret"]:
                    return 1.0
                turn = await model.turn("higher\\n" if turn.text < prompt.data["secret"] else "lower\\n")
            return 0.0

`play` runs in an environment process, beside many others of its kind.  It is cancelled at the episode's deadline.  An
agent that somebody else wrote is played by pointing its SDK at `model.base_url` with `model.key`; what it asks there
becomes the episode's trajectories, with no call of `turn`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from stream_rl.errors import StreamRLError
from stream_rl.task import Prompt

Message = Mapping[str, Any]
"""One message of a chat, as OpenAI's chat completions have it: role, content, tool_calls, tool_call_id, ..."""


class EpisodeFailed(StreamRLError):
    """Raised by `play`: this episode has no reward, through no fault of the model; it is dropped and counted under
    `reason`, and its group goes on without it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """As the model wrote it."""

    id: str
    name: str
    arguments: str
    """JSON, if the model wrote JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What the model said."""

    text: str
    """Special tokens left out; without what was parsed as reasoning or tool calls."""
    finish: Literal["stop", "length"]
    """length: it was cut at its token budget."""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """If `agent.tool_parser` is set."""


class Model(Protocol):
    """The policy in training, as one episode sees it."""

    @property
    def base_url(self) -> str:
        """Of the endpoint for SDKs: OpenAI's take `base_url + "/v1"`, Anthropic's take it as it is."""
        ...

    @property
    def key(self) -> str:
        """The API key of this episode, by which the endpoint knows it."""
        ...

    async def turn(self, observation: str | Sequence[Message] = "", *, tools: Sequence[Mapping[str, Any]] = ()) -> Turn:
        """The model's next turn, after what it observes.

        observation: text is tokenized as it is, messages as the model's chat template has them; either way once, behind
        the tokens that are there.  The first turn follows the prompt's text, if that has any.
        tools: JSON schemas as in OpenAI's chat completions, for the template; of the first turn.

        Raises EpisodeFailed when there can be no further turn (max_turns, the context is full, the run drains).
        """
        ...

    async def reward_so_far(self, reward: float) -> None:
        """What the episode is worth if its deadline comes now; without it, one that is cut is dropped."""
        ...


class EpisodeTask(Protocol):
    """A task of many turns; it has `prompts` too."""

    async def play(self, prompt: Prompt, model: Model) -> float | Mapping[str, float]:
        """One episode; what it is worth, as a task's `reward` gives it.  Raising EpisodeFailed costs this one episode,
        under its reason; so does raising anything else, as environment_raised."""
        ...
