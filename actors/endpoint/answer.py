"""What an API answers from: one turn of the model, and how it is named."""

from dataclasses import dataclass
from enum import StrEnum

from actors.chat import Piece
from actors.chat_parsing import Said


class Ending(StrEnum):
    """Why a turn has no more tokens.  An episode that has ended and a context that is full are errors instead: nothing
    was sampled."""

    STOP = "stop"
    """The model ended it."""
    STOP_SEQUENCE = "stop_sequence"
    """One of the request's own."""
    LENGTH = "length"
    """The request's budget."""
    CONTEXT = "context"
    """The recipe's budget, or the context: less than the request would have taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One turn."""

    id: str
    """Of the turn; each API has its own prefix."""
    created: int
    """Unix seconds."""
    said: Said
    ending: Ending
    stop_sequence: str | None
    num_prompt: int
    """Tokens of the trajectory before the turn."""
    num_held: int
    """Of them, those that its branch held already."""
    num_sampled: int
    pieces: tuple[Piece, ...] = ()
    """[sampled] without the token that ended the turn; only if log-probs were asked for."""
    logprobs: tuple[float, ...] = ()
    """[sampled] as `pieces`."""
