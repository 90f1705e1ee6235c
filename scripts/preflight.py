"""Everything that can be wrong with a recipe, found before anything expensive starts.  Imports no torch."""

import itertools
import pathlib
import socket

from tokenizers import Tokenizer

from actors.chat import ChatFormat
from actors.sampling import RESERVE_TOKENS
from algorithms import settings
from engines.megatron.model_shape import ModelShape, read_model_shape
from engines.megatron.parallel_sizes import check_division, check_processes
from engines.sglang.client import check_sampling
from queues import admission
from stream_rl.config import Critic, Recipe, Reference, Supervise, Teacher
from stream_rl.errors import ConfigError, TaskError, WireError
from stream_rl.plain import pack
from stream_rl.task import Prompt, load_task, plays

SGLANG_SIZES = ("dp_size", "data_parallel_size", "pp_size", "pipeline_parallel_size", "nnodes")
SGLANG_NOT_YET = ("speculative_algorithm", "quantization", "lora_paths", "disaggregation_mode")
SGLANG_FAMILIAR = frozenset(
    {"device", "attention_backend", "sampling_backend", "grammar_backend", "dtype", "skip_tokenizer_init", "port",
     "max_total_tokens", "max_running_requests", "mem_fraction_static", "chunked_prefill_size", "sleep_on_idle",
     "disable_overlap_schedule", "disable_radix_cache", "log_level"}
)  # fmt: skip
"""Options that every supported SGLang has; about any other SGLang is asked first."""
SIGN_OF_LIFE_SECONDS = 1.0
"""Every process says something to the queue about this often."""
PROMPTS_TRIED = 16
"""Prompts of each split that are made and tokenized beforehand."""


def check(recipe: Recipe) -> None:
    """Raises ConfigError or TaskError with one line that says what to change."""
    shape = read_model_shape(recipe.model.path)
    admission.check(recipe.queue, recipe.rollout)
    check_sampling(recipe.rollout.sampling)
    _check_numbers(recipe)
    _check_supervise(recipe.supervise)
    _check_sglang(recipe)
    check_processes(recipe.learner.model, recipe.learner.processes)
    check_division(shape, recipe.learner.model)
    tokenizer = _tokenizer(recipe, shape)
    _check_models_beside(recipe, shape, tokenizer)
    _check_prompts(recipe, shape, tokenizer)


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


def _check_numbers(recipe: Recipe) -> None:
    rollout = recipe.rollout
    if rollout.temperature <= 0:
        raise ConfigError(
            f"rollout.temperature must be above 0, got {rollout.temperature}; greedy decoding has no policy gradient"
        )
    for name, value, least in (
        ("run.steps", recipe.run.steps, 1),
        ("run.seconds", recipe.run.seconds, 0),
        ("rollout.group_size", rollout.group_size, 1),
        ("rollout.heldout_prompts", rollout.heldout_prompts, 0),
        ("rollout.heldout_concurrency", rollout.heldout_concurrency, 1),
        ("rollout.reward_processes", rollout.reward_processes, 1),
        ("rollout.reward_timeout_s", rollout.reward_timeout_s, 0.001),
        ("rollout.request_timeout_s", rollout.request_timeout_s, 0.001),
        ("rollout.max_kv_age", rollout.max_kv_age, 0),
        ("agent.processes", recipe.agent.processes, 1),
        ("agent.max_turns", recipe.agent.max_turns, 1),
        ("agent.max_turn_tokens", recipe.agent.max_turn_tokens, 0),
        ("agent.max_context_tokens", recipe.agent.max_context_tokens, 0),
        ("agent.deadline_s", recipe.agent.deadline_s, 0.001),
        ("agent.turn_gap_s", recipe.agent.turn_gap_s, 0.001),
        ("learner.micro_batch_tokens", recipe.learner.micro_batch_tokens, 1),
        ("learner.max_sequence_tokens", recipe.learner.max_sequence_tokens, 0),
        ("learner.processes", recipe.learner.processes, 1),
        ("learner.threads", recipe.learner.threads, 1),
        ("learner.checkpoint_every", recipe.learner.checkpoint_every, 0),
        ("learner.capsules", recipe.learner.capsules, 0),
        ("learner.peak_flops", recipe.learner.peak_flops, 0),
        ("warm_start.steps", recipe.warm_start.steps, 0),
        ("warm_start.sequences", recipe.warm_start.sequences, 1),
        ("weights.part_bytes", recipe.weights.part_bytes, 1),
        ("weights.parts_ahead", recipe.weights.parts_ahead, 1),
        ("weights.verify_every", recipe.weights.verify_every, 0),
        ("weights.keep_deltas", recipe.weights.keep_deltas, 1),
        ("weights.anchor_every", recipe.weights.anchor_every, 1),
        ("engine.count", recipe.engine.count, 1),
        ("engine.chunk_tokens", recipe.engine.chunk_tokens, 1),
        ("engine.chunk_seconds", recipe.engine.chunk_seconds, 0.001),
        ("engine.buffer_bytes", recipe.engine.buffer_bytes, 1 << 16),
        ("engine.resend_seconds", recipe.engine.resend_seconds, 0.01),
        ("engine.start_timeout_s", recipe.engine.start_timeout_s, 1),
        ("supervise.stop_timeout_s", recipe.supervise.stop_timeout_s, 0.1),
        ("supervise.stall_timeout_s", recipe.supervise.stall_timeout_s, 1),
        ("supervise.retry_s", recipe.supervise.retry_s, 0.05),
        ("supervise.silence_timeout_s", recipe.supervise.silence_timeout_s, 3 * SIGN_OF_LIFE_SECONDS),
        ("supervise.max_restarts", recipe.supervise.max_restarts, 0),
        ("supervise.restart_window_s", recipe.supervise.restart_window_s, 1),
    ):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    _check_devices(recipe)
    settings.check(recipe.algorithm)
    compares = recipe.algorithm.advantage in settings.GROUP_RELATIVE or recipe.queue.filter == "equal_rewards"
    if compares and rollout.group_size < 2:
        raise ConfigError(
            f"rollout.group_size must be at least 2, got {rollout.group_size}: algorithm.advantage = "
            f'"{recipe.algorithm.advantage}" with queue.filter = "{recipe.queue.filter}" compares members of a group'
        )


def _check_devices(recipe: Recipe) -> None:
    ranks = recipe.sglang.get("tp_size", 1)
    for name, devices, least, why in (
        ("engine.devices", recipe.engine.devices, ranks, "sglang.tp_size"),
        ("learner.devices", recipe.learner.devices, recipe.learner.processes, "learner.processes"),
    ):
        if devices and (len(set(devices)) < max(least, len(devices)) or min(devices) < 0):
            raise ConfigError(f"{name} must name {least} GPUs or more ({why}), none of them twice, got {list(devices)}")


def _check_models_beside(recipe: Recipe, shape: ModelShape, tokenizer: Tokenizer) -> None:
    """Reference, teacher and critic: those that are asked are there and know the policy's tokens."""
    algorithm = recipe.algorithm
    sections: list[tuple[str, Reference | Teacher | Critic, bool, str]] = [
        ("reference", recipe.reference, algorithm.kl_coefficient > 0.0, "algorithm.kl_coefficient above 0"),
        ("teacher", recipe.teacher, algorithm.advantage == "distillation", 'algorithm.advantage = "distillation"'),
        ("critic", recipe.critic, algorithm.advantage == "gae", 'algorithm.advantage = "gae"'),
    ]
    for name, section, asked, who in sections:
        if not asked:
            if section != type(section)():
                raise ConfigError(f"[{name}] is only for {who}; leave it out")
            continue
        if not section.path:
            if name == "teacher":
                raise ConfigError(f"{who} needs teacher.path, a Hugging Face directory; set it")
            continue
        theirs = read_model_shape(section.path)
        if theirs.vocab_size < shape.vocab_size or _vocabulary(section.path) not in (None, tokenizer.get_vocab()):
            raise ConfigError(
                f"{name}.path = {section.path} must have the policy's vocabulary, token for token: the same ids mean "
                f"other words there, or it has fewer ({theirs.vocab_size}) than the policy's {shape.vocab_size}"
            )
        longest = min(recipe.sglang.get("context_length", shape.max_positions), shape.max_positions)
        if theirs.max_positions < longest:
            raise ConfigError(
                f"{name}.path = {section.path} has {theirs.max_positions} positions, trajectories may have {longest}; "
                "set sglang.context_length"
            )


def _vocabulary(path: str) -> dict[str, int] | None:
    """Of the tokenizer beside a model; None if there is none, as then nothing can differ."""
    file = pathlib.Path(path) / "tokenizer.json"
    try:
        vocabulary: dict[str, int] | None = Tokenizer.from_file(str(file)).get_vocab() if file.is_file() else None
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"{file} is no tokenizer: {error}") from error
    return vocabulary


def _check_supervise(supervise: Supervise) -> None:
    """A wait for a peer must outlast the peer's restart, or one process that stalls takes the others along."""
    if supervise.max_restarts and supervise.peer_timeout_s <= supervise.silence_timeout_s:
        raise ConfigError(
            f"supervise.peer_timeout_s must be above supervise.silence_timeout_s, got {supervise.peer_timeout_s} and "
            f"{supervise.silence_timeout_s}: a process that stalls is started again only after the silence, and the "
            "others must wait for it until then"
        )


def _check_sglang(recipe: Recipe) -> None:
    for name in SGLANG_SIZES:
        if recipe.sglang.get(name, 1) != 1:
            raise ConfigError(
                f"[sglang] {name} must be 1, got {recipe.sglang[name]!r}: only tensor-parallel ranks (tp_size) of one "
                "host can be updated live yet; for more engines set engine.count"
            )
    ranks = recipe.sglang.get("tp_size", 1)
    if type(ranks) is not int or ranks < 1:
        raise ConfigError(f"[sglang] tp_size must be a number of at least 1, got {ranks!r}")
    for name in SGLANG_NOT_YET:
        if recipe.sglang.get(name) is not None:
            raise ConfigError(f"[sglang] {name} cannot be combined with live weight updates yet; leave it out")
    for name, instead in (
        ("model_path", "model.path"),
        ("host", "127.0.0.1, always"),
        ("tensor_parallel_size", "tp_size"),
    ):
        if name in recipe.sglang:
            raise ConfigError(f"[sglang] {name} is not an option of a run; it is {instead}")
    if (port := recipe.sglang.get("port")) is None:
        return
    if not isinstance(port, int):
        raise ConfigError(f"[sglang] port must be a number, got {port!r}")
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
    use, context = recipe.task.use, min(shape.max_positions, recipe.sglang.get("context_length", shape.max_positions))
    pool = recipe.sglang.get("max_total_tokens", 1 << 40) - RESERVE_TOKENS
    task = load_task(use, recipe.task.options)
    if plays(task):  # what fits is seen turn by turn; an episode may bring its prompt itself
        least, room = 0, min(context, pool) - 1
        beside = "one sampled token"
        if recipe.agent.chat_template or recipe.agent.tool_parser or recipe.agent.reasoning_parser:
            ChatFormat.load(recipe)
    else:
        least, room = 1, min(context - recipe.rollout.max_new_tokens, pool)
        beside = f"rollout.max_new_tokens = {recipe.rollout.max_new_tokens}"
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
            if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
                raise TaskError(f"{use}: prompts({split!r}) must give stream_rl.task.Prompt of a text, got {prompt!r}")
            try:
                pack(dict(prompt.data))
            except WireError as error:
                raise TaskError(
                    f"{use}: a prompt's data cannot travel to the process that scores or plays it: {error}"
                ) from error
            length = len(tokenizer.encode(prompt.text).ids)
            if not least <= length <= room:
                raise ConfigError(
                    f"{use}: a prompt of {length} tokens; it must have {least} to {room}, what the context or the KV "
                    f"pool leaves beside {beside}"
                )
