"""One lease, one step: what the models beside the policy say, the batch, the optimizer's step, and its measures."""

from typing import Protocol

from actors.batches import critic_batch, training_batch
from actors.capsules import Capsules
from actors.capsules import Engine as CapsuleEngine
from actors.scoring import Beside, needed, score
from algorithms.critic import explained_variance, make_value_loss
from algorithms.losses import effective_sample_size, make_loss
from engines.megatron.critic import Critic
from engines.megatron.flops import model_flops, peak_flops
from engines.megatron.model_shape import ModelShape
from engines.megatron.reference import FrozenPolicy
from stream_rl import config
from stream_rl.messages import Lease
from stream_rl.types import TrainingBatch


class Engine(CapsuleEngine, Protocol):
    """The policy, in training."""

    shape: ModelShape


def models_beside(recipe: config.Recipe) -> Beside:
    """The models that the recipe's algorithm asks, loaded.  The policy's learner comes first.

    Raises ConfigError for a model that cannot be used, WeightsError if its weights do not fit.
    """
    policy, learner, asked = recipe.model.path, recipe.learner, needed(recipe.algorithm)
    return Beside(
        reference=FrozenPolicy(recipe.reference.path or policy, learner) if asked["reference"] else None,
        teacher=FrozenPolicy(recipe.teacher.path, learner) if asked["teacher"] else None,
        critic=Critic(policy, learner, recipe.critic, recipe.run.seed) if asked["critic"] else None,
    )


class Training:
    """Blocking; not thread-safe, as the engine is not."""

    def __init__(self, recipe: config.Recipe, run: str, engine: Engine, beside: Beside) -> None:
        """Raises ConfigError for an [algorithm] that does not fit."""
        algorithm, capsules = recipe.algorithm, recipe.run_directory / "capsules"
        self._recipe, self._engine, self._beside = recipe, engine, beside
        self._loss, self._value_loss = make_loss(algorithm.loss, algorithm), make_value_loss(algorithm)
        self._capsules = Capsules(capsules, recipe.learner.capsules, run, algorithm, engine)
        self._peak_flops = recipe.learner.processes * peak_flops(recipe.learner.peak_flops, engine.shape.dtype)

    def step(self, lease: Lease) -> dict[str, float]:
        """Train on a lease.  Returns `MegatronLearner.train_step`'s report with more beside it; what was not measured
        in this step is not there.

        Of the models beside the policy: `scoring_seconds`, and the seconds and bytes of each; of a critic what
        `train_step` reports of it, `critic_` before each name, with `critic_explained_variance`.
        Of the step: `effective_sample_size`, `zero_advantage_share` (of the trained tokens), `tokens_per_second` and
        `model_flops_utilization`, both over the time of the policy's forward, backward and optimizer.
        Of one that was skipped: `not_finite` (1.0), unless nothing in it was to be trained.
        Raises WireError and ValueError as `training_batch`.
        """
        algorithm = self._recipe.algorithm
        views, metrics = score(lease, self._beside, self._recipe)
        batch = training_batch(lease, algorithm, self._recipe.rollout.temperature, views)
        metrics |= self._engine.train_step(batch, self._loss)
        if metrics["skipped"]:
            if metrics["trained_tokens"]:
                metrics["not_finite"] = 1.0
                self._capsules.keep(lease, batch, metrics)
            return metrics
        metrics |= self._measures(batch, metrics)
        if self._beside.critic is not None:
            own = critic_batch(batch, lease, algorithm, views)
            metrics |= critic_metrics(self._beside.critic.train_step(own, self._value_loss))
        return metrics

    def _measures(self, batch: TrainingBatch, metrics: dict[str, float]) -> dict[str, float]:
        seconds = metrics["forward_backward_seconds"] + metrics["optimizer_seconds"]
        found = {
            "effective_sample_size": effective_sample_size(metrics),
            "zero_advantage_share": float((batch.advantages[batch.loss_weights != 0.0] == 0.0).mean()),
            "tokens_per_second": len(batch.token_ids) / seconds,
        }
        if self._peak_flops:
            flops = model_flops(self._engine.shape, batch.lengths)
            found["model_flops_utilization"] = flops / seconds / self._peak_flops
        return found


def critic_metrics(report: dict[str, float]) -> dict[str, float]:
    """A critic's report under names of its own; its entropy and its counts of tokens say nothing."""
    told = {name: value for name, value in report.items() if name not in ("entropy", "tokens", "trained_tokens")}
    if not report["skipped"]:
        told["explained_variance"] = explained_variance(report)
    return {f"critic_{name}": value for name, value in told.items()}
