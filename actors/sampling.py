"""How prompts become requests, and what engines answer becomes text."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from engines.megatron.model_shape import read_model_shape
from stream_rl import config


class Sampling:
    """One recipe's tokenizer and sampling parameters."""

    def __init__(self, recipe: config.Recipe) -> None:
        self._tokenizer = Tokenizer.from_file(f"{recipe.model.path}/tokenizer.json")
        self._parameters = {
            "temperature": recipe.rollout.temperature,
            "stop_token_ids": list(read_model_shape(recipe.model.path).eos_token_ids),
            **recipe.rollout.sampling,
        }
        self.max_new_tokens = recipe.rollout.max_new_tokens

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Without special tokens: a reward sees no stop token."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def parameters(self, max_new_tokens: int) -> dict[str, Any]:
        """SGLang's sampling parameters for a request of this many tokens at most."""
        return self._parameters | {"max_new_tokens": max_new_tokens}
