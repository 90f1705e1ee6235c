"""The processes of a learner as one: the first has the models of all, the others follow it."""

import contextlib
from collections.abc import Iterator

from actors.scoring import Beside
from algorithms.critic import make_value_loss
from algorithms.losses import cross_entropy, make_loss
from engines.megatron.learner import MegatronLearner
from engines.megatron.ranks import Ranks
from stream_rl import config

BESIDE = ("reference", "teacher", "critic")


@contextlib.contextmanager
def together(
    recipe: config.Recipe, engine: MegatronLearner, beside: Beside
) -> Iterator[tuple[MegatronLearner, Beside] | None]:
    """The policy and the models beside it, as one process would have them; None on the others, at the end of the first.

    engine, beside: this process's.  Raises EngineError if another process is lost.
    """
    if recipe.learner.processes == 1:
        yield engine, beside
        return
    section = recipe.algorithm
    losses = {
        "policy": make_loss(section.loss, section),
        "value": make_value_loss(section),
        "supervised": cross_entropy,
    }
    others = {name: model for name in BESIDE if (model := getattr(beside, name)) is not None}
    ranks = Ranks({"policy": engine, **others}, losses, recipe.learner.process_timeout_s)
    if ranks.rank:
        ranks.follow()
        yield None
        return
    with ranks.leading():
        yield (
            ranks.led("policy", MegatronLearner),
            Beside(**{name: ranks.led(name, type(others[name])) for name in others}),
        )
