"""How prompts become requests, and what engines answer becomes text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from engines.megatron.model_shape import read_model_shape
from stream_rl import config

RESERVE_TOKENS = 6
"""SGLang takes no prompt within this many tokens of its KV pool."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of tokens and turns."""

    max_new_tokens: int
    """Sampled, of a trajectory."""
    max_turn_tokens: int
    """Sampled, of a turn."""
    max_context_tokens: int
    """Of a trajectory."""
    max_turns: int
    """Of an episode."""


class Sampling:
    """One recipe's tokenizer and sampling parameters."""

    def __init__(self, recipe: config.Recipe) -> None:
        self._tokenizer = Tokenizer.from_file(f"{recipe.model.path}/tokenizer.json")
        shape, rollout, agent = read_model_shape(recipe.model.path), recipe.rollout, recipe.agent
        self._parameters = {
            "temperature": rollout.temperature,
            "stop_token_ids": list(shape.eos_token_ids),
            **rollout.sampling,
        }
        context = min(
            shape.max_positions,
            recipe.sglang.get("context_length", shape.max_positions),
            recipe.sglang.get("max_total_tokens", 1 << 40) - RESERVE_TOKENS,
        )
        self.limits = Limits(
            max_new_tokens=rollout.max_new_tokens,
            max_turn_tokens=agent.max_turn_tokens or rollout.max_new_tokens,
            max_context_tokens=min(agent.max_context_tokens or context, context),
            max_turns=agent.max_turns,
        )

    def encode(self, text: str) -> list[int]:
        return self._encode(text, True)

    def encode_observation(self, text: str) -> list[int]:
        """Behind tokens that are there: without what the tokenizer puts around a whole text."""
        return self._encode(text, False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # a batch, for `encode` keeps other threads from running: seconds for a megabyte
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Without special tokens: a reward sees no stop token."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def parameters(self, max_new_tokens: int, stop: Sequence[str] = ()) -> dict[str, Any]:
        """SGLang's sampling parameters for a request of this many tokens at most, or to one of these strings."""
        limits: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        return self._parameters | limits | ({"stop": list(stop)} if stop else {})
