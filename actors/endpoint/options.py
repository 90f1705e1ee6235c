"""What an endpoint has to know of its recipe."""

from dataclasses import dataclass

from stream_rl import config


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointOptions:
    """Seconds, bytes and tokens."""

    model: str = "policy"
    """Its name in /v1/models; requests may give any."""
    max_context_tokens: int = 0
    """Of a trajectory, so that a text that cannot fit is not tokenized.  0: not known."""
    stop_sequences: bool = True
    """Whether the engines can end a turn at a string; those without a tokenizer cannot."""
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 60.0
    """Longest that a client may take to send its request."""
    keep_alive_s: float = 10.0
    """Between two signs of life on a stream whose turn is not whole."""

    @classmethod
    def of(cls, recipe: config.Recipe, max_context_tokens: int) -> "EndpointOptions":
        return cls(
            model=recipe.model.path.rstrip("/").rpartition("/")[2] or "policy",
            max_context_tokens=max_context_tokens,
            stop_sequences=not recipe.sglang.get("skip_tokenizer_init"),
        )
