"""The recipe: frozen dataclasses, read from TOML, changed from the command line.

One section per part of the system.  An unknown key is an error that lists the known ones; a wrong type says what was
expected and what came.  Options of SGLang and megatron-core pass through under their own names, untouched
(`[sglang]`, `[learner.model]`, `[learner.optimizer]`).
"""

import dataclasses
import pathlib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec
import tomli_w

from stream_rl.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    name: str
    steps: int
    """Optimizer steps to take."""
    seconds: float = 0.0
    """The first step to end so long after the first lease is the last, if there were not `steps` of them.  0: none."""
    seed: int = 0
    directory: str = "runs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    path: str
    """A Hugging Face directory: config.json, *.safetensors, tokenizer.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskChoice:
    use: str
    """package.module:Class or path/to/file.py:Class; see stream_rl/task.py."""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    group_size: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    sampling: dict[str, Any] = field(default_factory=dict)
    """SGLang sampling parameters under their own names; those without a correction are refused."""
    heldout_prompts: int = 128
    """Held-out prompts sampled once each, at the first and at the last version; 0 turns evaluation off."""
    heldout_concurrency: int = 64
    reward_processes: int = 1
    reward_timeout_s: float = 10.0
    request_timeout_s: float = 600.0
    """Longest that one request to an engine may take."""
    max_kv_age: int = 8
    """Versions.  A later segment reuses the prefix that its trajectory left on the engine while the oldest weights in
    it are at most this many versions behind; past that the prefix is computed again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    min_tokens: int
    """A step trains on at least this many trainable tokens."""
    max_tokens: int
    """A lease holds at most this many tokens of any kind; a larger group is leased alone."""
    mode: Literal["streaming", "rounds", "synchronous", "one_step_off"] = "streaming"
    """streaming: nothing is cut because a batch filled.  rounds (APRIL): over-provision, stop when a step's tokens are
    there, resume what was cut first in the next round.  synchronous and one_step_off, to compare with: a step trains on
    all of `first_groups` groups; the next are begun when every engine holds the version that it came to, or when its
    lease was taken."""
    in_flight: Literal["steered", "fixed"] = "steered"
    """streaming: how many groups are under way.  steered: up to the engines' measured saturation knee, and fewer when
    trained tokens get older than `target_token_age`; fixed: `over_provision`."""
    over_provision: float = 2.0
    """fixed and rounds: groups admitted and not yet trained, as a multiple of what one step is expected to take; where
    a steered run starts."""
    target_token_age: float = 2.0
    """steered: versions; the mean age of trained tokens that admission stays below."""
    first_groups: int = 8
    """Groups that a step is expected to take before any has finished."""
    max_token_age: int = 8
    """Versions; older tokens are masked out of the loss.  -1: no bound."""
    max_token_age_of: dict[str, int] = field(default_factory=dict)
    """The same for single tasks, by the name in `task.use`."""
    group_deadline_s: float = 0.0
    """A group that has been growing for this long goes on without its unfinished members.  0: none."""
    filter: Literal["none", "equal_rewards"] = "none"
    """Groups that are dropped when they are complete.  equal_rewards: those that have nothing to compare."""
    lease_timeout_s: float = 600.0
    """Longest that the learner waits for a lease."""
    commit_seconds: float = 0.02
    """Longest that an accepted message waits for others before it is written to the journal and acknowledged."""
    fsync: bool = True
    """Acknowledged messages survive power loss, not only the end of a process."""
    snapshot_bytes: int = 256 << 20
    """Journal between two snapshots of the queue's state; what older snapshots need is then reclaimed."""
    keep_journal: bool = False
    """Reclaim nothing, so that the whole run can be replayed (`stream-rl simulate --replay`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Algorithm:
    """algorithms/README.md has every choice with its formula, its source and when to use it."""

    advantage: Literal[
        "grpo", "centered", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae", "distillation"
    ] = "grpo"
    """grpo: reward minus group mean, over group std; centered: without the std."""
    gamma: float = 1.0
    """reinforce_plus_plus and gae: discount of a later token's reward."""
    gae_lambda: float = 0.95
    """gae: 1 is the return less the value, 0 the one-step error."""
    loss: Literal["ppo_clip", "dual_clip", "gspo", "cispo"] = "ppo_clip"
    clip_low: float = 0.2
    """The policy's ratio is clipped at 1 - clip_low ..."""
    clip_high: float = 0.2
    """... and at 1 + clip_high (clip-higher: 0.28).  Without effect unless `importance = "ratio"`: the ratio to the
    policy that a step begins with is 1, since a lease is one step."""
    dual_clip: float = 3.0
    """dual_clip: what is bad counts at most this many times its advantage."""
    importance: Literal["none", "ratio", "token", "sequence", "geometric"] = "token"
    """The correction for what the behaviour policy was.  ratio: it is in the loss's clipped ratio; token, sequence,
    geometric: a truncated weight before the loss, from each token's ratio, their product or their geometric mean."""
    importance_cap: float = 2.0
    """Truncation of the importance weight current/behaviour."""
    masks: dict[str, tuple[float, float]] = field(default_factory=dict)
    """What is dropped from the loss: `{ geometric = [0.99, 1.01] }` keeps the sequences whose geometric mean of ratios
    is within.  token (IcePop), sequence, geometric, veto; several can be combined."""
    kl_coefficient: float = 0.0
    """Weight of the KL to the reference policy; 0: no reference is needed."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    overlong_buffer: int = 0
    """Sampled tokens before `overlong_length` over which the reward falls by `overlong_penalty` (DAPO).  0: off."""
    overlong_length: int = 0
    """Sampled tokens of the longest answer that is wanted: mostly `rollout.max_new_tokens`."""
    overlong_penalty: float = 1.0
    value_clip: float = 0.5
    """gae: how far the critic's value may move from what it was when advantages were made.  0: not clipped."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    constant: float = 0.0
    """The divisor of `aggregation = "constant"`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    micro_batch_tokens: int = 8192
    """Packed tokens of one forward-backward; one longer sequence goes alone."""
    max_sequence_tokens: int = 0
    """A longer sequence is an error.  0: as long as the model has positions."""
    processes: int = 1
    """Started by torchrun if there are several.  What model.tensor_model_parallel_size times
    model.pipeline_model_parallel_size leaves of them is data-parallel."""
    process_timeout_s: float = 600.0
    """Longest that one of them waits for another."""
    devices: tuple[int, ...] = ()
    """GPUs of this machine for its processes, one each; engines may be on them too.  Empty: the first ones."""
    threads: int = 1
    """CPU threads of each learner process."""
    checkpoint_every: int = 20
    """Steps between checkpoints: a learner that is lost goes on from the last one.  The last two are kept.  0: only at
    the end, so that a lost learner begins again."""
    model: dict[str, Any] = field(default_factory=dict)
    """megatron-core TransformerConfig, under its own names."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """megatron-core OptimizerConfig, under its own names: lr, weight_decay, adam_beta1, clip_grad, ..."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """megatron-core OptimizerParamScheduler, under its own names: lr_warmup_steps, lr_decay_steps, ..."""
    schedule_unit: Literal["steps", "tokens"] = "steps"
    """What lr_warmup_steps and the like count: optimizer steps, or tokens trained."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """megatron-core DistributedDataParallelConfig, under its own names: use_distributed_optimizer, ..."""
    leases: Literal["train", "record", "only_record"] = "train"
    """What becomes of a lease.  record: it is also kept under leases/ in the run's directory, so that the steps can be
    taken again (`stream-rl learner replay`, `stream-rl train --train-only`), and with it, for one more forward pass a
    step, the learner's log-probs (`stream-rl trajectory show`); only_record: it is kept and not trained on
    (`stream-rl train --rollout-only`)."""
    max_skipped_steps: int = 10
    """So many skipped steps in a row end the run.  0: they never do."""
    capsules: int = 4
    """Steps skipped for a loss or gradient that was not finite whose batch is kept, the newest; see
    `stream-rl learner capsule`."""
    peak_flops: float = 0.0
    """Floating-point operations a second that one device can do, for the model FLOPs utilisation.  0: that of a known
    GPU in bfloat16, and elsewhere none is reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The policy that `algorithm.kl_coefficient` keeps near: frozen."""

    path: str = ""
    """A Hugging Face directory with the policy's vocabulary; empty: the weights that the run starts with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """The policy that `advantage = "distillation"` learns from: frozen."""

    path: str = ""
    """A Hugging Face directory with the policy's vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Critic:
    """The value model of `advantage = "gae"`, trained on the same leases and devices as the policy."""

    path: str = ""
    """A Hugging Face directory with the policy's vocabulary; empty: the weights that the run starts with.  The output
    layer is replaced by one value a token, which begins at 0."""
    model: dict[str, Any] = field(default_factory=dict)
    """megatron-core TransformerConfig, under its own names; what is not here is as in [learner.model]."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """megatron-core OptimizerConfig, under its own names; what is not here is as in [learner.optimizer]."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """megatron-core OptimizerParamScheduler, under its own names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStart:
    """Supervised steps on the task's demonstrations before the run; needs `demonstrations()` in the task."""

    steps: int = 0
    sequences: int = 8
    """Demonstrations of one step."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    delivery: Literal["live", "reload"] = "live"
    """live: in the background, between two steps of the engine.  reload: to compare with, as others do it; each engine
    is paused for each version and loads all weights from a checkpoint on the disk."""
    part_bytes: int = 4 << 20
    """A part of an update has about this size; one slice of a tensor, 16 MiB at most, is never divided."""
    parts_ahead: int = 4
    """Parts on their way to an engine's rank that it has not yet taken: bounds what waits in sockets."""
    verify_every: int = 20
    """Versions between full recomputations of an engine's hash."""
    keep_deltas: int = 8
    """Versions that an engine may lag and still be brought up by what changed; beyond, it gets all weights."""
    directory: str = ""
    """Where updates are written too, for `stream-rl weights relay` at another site; relative to the run directory."""
    anchor_every: int = 50
    """Versions between two files in that directory that hold all weights: where a relay may begin."""
    stock_servers: tuple[str, ...] = ()
    """Addresses of SGLang servers without our plugin that are fed through their own endpoints, pausing each time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    count: int = 1
    devices: tuple[int, ...] = ()
    """GPUs of this machine that the engines take in turn, each as many as its `sglang.tp_size`.  Empty: all of them see
    all, and take the first."""
    chunk_tokens: int = 16
    """A chunk leaves the scheduler when a request has this many new tokens ..."""
    chunk_seconds: float = 0.25
    """... or when its oldest unsent token is this old."""
    buffer_bytes: int = 64 << 20
    """Chunks kept until acknowledged; when full, tokens wait in their requests."""
    resend_seconds: float = 2.0
    """Unacknowledged chunks are sent again after this long."""
    start_timeout_s: float = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Agent:
    """Tasks of many turns; see stream_rl/episode.py."""

    processes: int = 1
    """Environment processes; each plays many episodes."""
    max_turns: int = 200
    """Of an episode, over all of its branches."""
    max_turn_tokens: int = 0
    """Sampled tokens of one turn.  0: as many as `rollout.max_new_tokens` leaves, which is of a whole trajectory."""
    max_context_tokens: int = 0
    """Tokens of a trajectory, prompt and observations included.  0: as many as the engines take."""
    deadline_s: float = 3600.0
    """Of an episode, from its start."""
    turn_gap_s: float = 600.0
    """Longest that an environment may take from one turn of the model to the next; one that hangs is ended."""
    tool_parser: str = ""
    """SGLang's name of the format in which the model calls tools: qwen25, llama3, ...; empty: calls are not parsed."""
    reasoning_parser: str = ""
    """SGLang's name of the format in which the model reasons: qwen3, deepseek-r1, ...; empty: it is in the text."""
    chat_template: str = ""
    """A Jinja file in place of the model's own template."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervise:
    stop_timeout_s: float = 10.0
    """From asking a process to end until it is killed."""
    stall_timeout_s: float = 600.0
    """A run in which nothing moves for this long ends, saying what was awaited."""
    peer_timeout_s: float = 60.0
    """Longest wait for an answer that needs no work: registrations, acknowledgements.  Covers a restart of the peer."""
    retry_s: float = 2.0
    """A request without an answer is sent again after this long: its receiver may have been restarted."""
    silence_timeout_s: float = 30.0
    """A process without a sign of life for this long is declared lost and started again."""
    max_restarts: int = 3
    """Restarts of one process in `restart_window_s`; one more ends the run, with the process's name."""
    restart_window_s: float = 600.0
    plain_progress_s: float = 5.0
    """Seconds between progress lines where there is no terminal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    run: Run
    model: Model
    task: TaskChoice
    queue: Queue
    rollout: Rollout = field(default_factory=Rollout)
    algorithm: Algorithm = field(default_factory=Algorithm)
    learner: Learner = field(default_factory=Learner)
    reference: Reference = field(default_factory=Reference)
    teacher: Teacher = field(default_factory=Teacher)
    critic: Critic = field(default_factory=Critic)
    warm_start: WarmStart = field(default_factory=WarmStart)
    weights: Weights = field(default_factory=Weights)
    engine: Engine = field(default_factory=Engine)
    agent: Agent = field(default_factory=Agent)
    supervise: Supervise = field(default_factory=Supervise)
    sglang: dict[str, Any] = field(default_factory=dict)
    """SGLang server arguments under their own names."""

    @property
    def run_directory(self) -> pathlib.Path:
        return pathlib.Path(self.run.directory) / self.run.name


def load(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `section.key=value` overrides (values are TOML; bare words are strings).

    Raises ConfigError naming the file, the key and what was expected.
    """
    path = pathlib.Path(path)
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for override in overrides:
        _override(table, override)
    return build(Recipe, table, str(path))


def dump(recipe: Recipe, path: pathlib.Path) -> None:
    """Write the resolved recipe; `load` reads it back to an equal one."""
    path.write_text(tomli_w.dumps(dataclasses.asdict(recipe)))


def build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """`cls` from nested tables.  Raises ConfigError for unknown or missing keys and for wrong types."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(table) - set(fields)):
        raise ConfigError(f"{where}: unknown keys {unknown}; {cls.__name__.lower()} has {sorted(fields)}")
    values = {}
    for name, f in fields.items():
        here = f"{where}: {name}" if ": " not in where else f"{where}.{name}"
        if name not in table:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{here} is missing; {cls.__name__.lower()} needs it")
            continue
        value, hint = table[name], hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{here} must be a table of options, got {value!r}")
            values[name] = build(typing.cast(type[Any], hint), value, here)
            continue
        if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
            raise ConfigError(f"{here} must be one of {list(typing.get_args(hint))}, got {value!r}")
        try:
            values[name] = msgspec.convert(value, hint)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{here}: {error}, got {value!r}") from error
    return cls(**values)


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"an override is section.key=value, got {override!r}")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a section")
    table[parts[-1]] = value
