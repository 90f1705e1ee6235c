"""The engines that the benches start: SGLang's options for the machine, and a recipe with only an engine in it."""

import pathlib
from typing import Any

from stream_rl import config


def sglang_options(requests: int, tokens: int, on_cpu: bool) -> dict[str, Any]:
    """requests: at once.  tokens: of all of them together, which the KV pool has to hold."""
    options: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "max_running_requests": requests,
        "max_total_tokens": tokens,
        "log_level_http": "warning",
        "sleep_on_idle": True,
    }
    if on_cpu:
        return options | {"device": "cpu", "attention_backend": "torch_native"}
    return options | {
        "device": "cuda",
        "attention_backend": "triton",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "mem_fraction_static": 0.5,  # of what is free when a server starts; max_total_tokens is what bounds it
        "cuda_graph_max_bs_decode": requests,
    }


def engine_recipe(
    name: str,
    directory: str,
    model: pathlib.Path,
    options: dict[str, Any],
    *,
    max_new_tokens: int,
    start_s: float,
    patience_s: float,
) -> config.Recipe:
    """options: SGLang's.  start_s: longest that the engine may take.  patience_s: for what its peers do in less."""
    return config.Recipe(
        run=config.Run(name=name, steps=1, directory=directory),
        model=config.Model(path=str(model)),
        task=config.TaskChoice(use="none:None"),
        queue=config.Queue(min_tokens=1, max_tokens=1),
        rollout=config.Rollout(max_new_tokens=max_new_tokens),
        weights=config.Weights(verify_every=0),
        engine=config.Engine(start_timeout_s=start_s),
        supervise=config.Supervise(peer_timeout_s=patience_s),
        sglang=options,
    )
