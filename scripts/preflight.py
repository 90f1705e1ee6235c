"""Everything that can be wrong with a recipe, found before anything expensive starts.  Imports no torch."""

import itertools
import pathlib
import socket

from tokenizers import Tokenizer

from engines.megatron.model_shape import ModelShape, read_model_shape
from engines.sglang.client import check_sampling
from queues import admission
from stream_rl.config import Recipe
from stream_rl.errors import ConfigError, TaskError
from stream_rl.task import Prompt, load_task

PROMPTS_TRIED = 16
"""Prompts of each split that are made and tokenized beforehand."""


def check(recipe: Recipe) -> None:
    """Raises ConfigError or TaskError with one line that says what to change."""
    shape = read_model_shape(recipe.model.path)
    admission.check(recipe.queue, recipe.rollout)
    check_sampling(recipe.rollout.sampling)
    _check_rollout(recipe)
    _check_sglang(recipe)
    _check_prompts(recipe, shape, _tokenizer(recipe, shape))


def _tokenizer(recipe: Recipe, shape: ModelShape) -> Tokenizer:
    path = pathlib.Path(recipe.model.path) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; model.path must hold the model's fast tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"{path} is no tokenizer: {error}") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= shape.vocab_size:
        raise ConfigError(
            f"the tokenizer does not fit the model: it has token id {largest}, the model's vocab_size is "
            f"{shape.vocab_size}; take the tokenizer that the model was trained with"
        )
    return tokenizer


def _check_rollout(recipe: Recipe) -> None:
    rollout = recipe.rollout
    if rollout.temperature <= 0:
        raise ConfigError(
            f"rollout.temperature must be above 0, got {rollout.temperature}; greedy decoding has no policy gradient"
        )
    if rollout.group_size < 2:
        raise ConfigError(
            f"rollout.group_size must be at least 2, got {rollout.group_size}; an advantage is relative to a group"
        )
    if recipe.run.steps < 1:
        raise ConfigError(f"run.steps must be at least 1, got {recipe.run.steps}")


def _check_sglang(recipe: Recipe) -> None:
    tp_size = recipe.sglang.get("tp_size", recipe.sglang.get("tensor_parallel_size", 1))
    if tp_size != 1:
        raise ConfigError(
            f"[sglang] tp_size must be 1, got {tp_size}: live updates of sharded engines are not there yet"
        )
    for name in ("speculative_algorithm", "quantization", "lora_paths"):
        if recipe.sglang.get(name) is not None:
            raise ConfigError(f"[sglang] {name} cannot be combined with live weight updates yet; leave it out")
    if (port := recipe.sglang.get("port")) is None:
        return
    for offset in range(recipe.engine.count):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port + offset))
            except (OSError, OverflowError) as error:
                raise ConfigError(
                    f"[sglang] port {port + offset} cannot be used: {error}; choose another or leave port out"
                ) from error


def _check_prompts(recipe: Recipe, shape: ModelShape, tokenizer: Tokenizer) -> None:
    use, room = recipe.task.use, shape.max_positions - recipe.rollout.max_new_tokens
    room = min(room, recipe.sglang.get("context_length", shape.max_positions) - recipe.rollout.max_new_tokens)
    task = load_task(use, recipe.task.options)
    for split in ("train", "heldout"):
        if split == "heldout" and recipe.rollout.heldout_prompts == 0:
            continue
        try:
            prompts = list(itertools.islice(task.prompts(split, recipe.run.seed), PROMPTS_TRIED))
        except Exception as error:  # the user's code
            raise TaskError(f"{use}: prompts({split!r}) raised {type(error).__name__}: {error}") from error
        if not prompts:
            raise TaskError(f"{use}: prompts({split!r}) gave none; set rollout.heldout_prompts = 0 to do without")
        for prompt in prompts:
            if not isinstance(prompt, Prompt):
                raise TaskError(f"{use}: prompts({split!r}) must give stream_rl.task.Prompt, got {prompt!r}")
            length = len(tokenizer.encode(prompt.text).ids)
            if not 0 < length <= room:
                raise ConfigError(
                    f"{use}: a prompt of {length} tokens; it must have 1 to {room}, the model's context less "
                    f"rollout.max_new_tokens = {recipe.rollout.max_new_tokens}"
                )
