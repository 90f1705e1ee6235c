"""megatron-core's optimizer and learning-rate schedule from a recipe's options."""

from collections.abc import Mapping
from typing import Any

from engines.megatron import core
from engines.megatron.options import arguments_of, check_options, fields_of
from stream_rl.errors import ConfigError

_OURS = {
    **dict.fromkeys(("bf16", "fp16", "params_dtype"), "it comes from the model's config.json"),
    **dict.fromkeys(("use_distributed_optimizer", "overlap_param_gather"), "set it in learner.ddp"),
    "timers": "a recipe cannot hold them",
    "min_lr": "set schedule.min_lr",
}
_SCHEDULE_OURS = {
    "optimizer": "the learner makes it",
    "max_lr": "the peak of the schedule is optimizer.lr",
    **dict.fromkeys(
        ("use_checkpoint_opt_param_scheduler", "override_opt_param_scheduler"), "checkpoints hold no options"
    ),
}


def build_optimizer(
    model: Any, options: Mapping[str, Any], schedule: Mapping[str, Any], section: str = "learner"
) -> tuple[Any, Any]:
    """megatron-core's optimizer over `model` (a DDP) and its OptimizerParamScheduler, under their own option names.

    The schedule is constant at optimizer.lr unless it says otherwise.  section: the recipe's, for messages.
    Raises ConfigError for options that are unknown, ours, of a wrong type, or that megatron-core refuses.
    """
    checked = check_options(f"{section}.optimizer", options, fields_of(core.OptimizerConfig), _OURS)
    if not (checked.get("lr") or 0.0) > 0.0:
        raise ConfigError(f"{section}.optimizer.lr must be a positive number, got {checked.get('lr')!r}; set it")
    arguments = _schedule_arguments(section, schedule, checked)
    model_config = model.config
    config = core.OptimizerConfig(
        **checked,
        min_lr=arguments["min_lr"],
        bf16=model_config.bf16,
        params_dtype=model_config.params_dtype,
        use_distributed_optimizer=model.ddp_config.use_distributed_optimizer,
        overlap_param_gather=model.ddp_config.overlap_param_gather,
    )
    try:
        # Without the overrides megatron-core decays norms too (since 0.16).
        optimizer = core.get_megatron_optimizer(
            config, [model], config_overrides=core.get_standard_config_overrides(config)
        )
        # Needed even for a constant rate: it is the scheduler that turns a group's wd_mult into its weight decay.
        scheduler = core.OptimizerParamScheduler(optimizer, **arguments)
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            f"megatron-core refuses [{section}.optimizer] {dict(options)} with [{section}.schedule] {arguments}: "
            f"{error or 'an assertion without a message failed'}"
        ) from error
    model_config.grad_scale_func = optimizer.scale_loss
    return optimizer, scheduler


def _schedule_arguments(section: str, schedule: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, Any]:
    known = arguments_of(core.OptimizerParamScheduler)
    checked = check_options(f"{section}.schedule", schedule, known, _SCHEDULE_OURS)
    style = checked.get("lr_decay_style", "constant")
    if style != "constant" and "lr_decay_steps" not in checked:
        raise ConfigError(f"{section}.schedule.lr_decay_steps is needed by lr_decay_style = {style!r}; set it")
    lr = optimizer["lr"]
    weight_decay = optimizer.get("weight_decay", core.OptimizerConfig().weight_decay)
    defaults = {
        "init_lr": 0.0,
        "max_lr": lr,
        "min_lr": 0.0,
        "lr_warmup_steps": 0,
        # megatron-core wants it beyond the warm-up even where nothing decays.
        "lr_decay_steps": checked.get("lr_warmup_steps", 0) + 1,
        "lr_decay_style": style,
        "start_wd": weight_decay,
        "end_wd": weight_decay,
        "wd_incr_steps": 0,
        "wd_incr_style": "constant",
    }
    return defaults | checked
