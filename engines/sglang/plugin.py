"""The plugin inside SGLang's scheduler process, found through SGLang's entry point `sglang.srt.plugins`.

    scheduler's thread (hooks)                          the plugin's thread
    --------------------------                          -------------------
    launch: tag the batch with the live version
    result: cut chunks out of its requests   ──rows──▶  number, send, keep, resend      ──▶ queue
    turn:   inject the commit it was told of ◀─order──  receive, check, stage updates   ◀── publisher
    commit: write, flip the version          ──live──▶  report                          ──▶ publisher

The commit travels through SGLang's own request list, so that every tensor-parallel rank makes it before the same step,
and an idle or sleeping engine makes it too (the plugin's wake-up is in the sleeper's poll set).

A fault in here is logged, counted and reported as `faults`; the plugin then stands still and the engine goes on.
"""

import functools
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from engines.sglang.prefix_keys import PrefixKeys, of_version
from engines.sglang.streaming import finish_of
from stream_rl.types import Finish, Version

log = logging.getLogger("stream_rl.plugin")
ENVIRONMENT = "STREAM_RL_PLUGIN"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginSettings:
    """What the launcher tells the plugin, through an environment variable that SGLang's processes inherit."""

    run: str
    engine: str
    incarnation: int
    http_address: str
    queue_address: str
    publisher_address: str
    chunk_tokens: int
    chunk_seconds: float
    buffer_bytes: int
    resend_seconds: float
    max_kv_age: int
    launcher_pid: int
    """The process to end, if the run goes on without this engine."""

    def export(self) -> None:
        os.environ[ENVIRONMENT] = json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class CommitWeights:
    """A request of ours in SGLang's request list: all ranks have staged `target`; live before the next step."""

    target: Version
    attempt: int


class Plugin:
    """The scheduler thread's side.  Made after the scheduler; hooks reach it through `_plugin`."""

    def __init__(self, settings: PluginSettings, scheduler: Any) -> None:
        # imported here: SGLang calls `register` in each of its processes, and only the scheduler's needs these
        from engines.sglang.counters import Counters
        from engines.sglang.plugin_thread import PluginThread
        from engines.sglang.staging import LiveWeights
        from engines.sglang.streaming import ChunkStream

        self.scheduler = scheduler
        self.counters = Counters()
        rank, ranks = scheduler.ps.tp_rank, scheduler.ps.tp_size
        weights = LiveWeights(settings.run, _trace(scheduler), Version(0, 0))
        self.thread = PluginThread(settings, rank, ranks, weights.device, weights, self.counters)
        self.weights = weights
        self.stream = ChunkStream(
            settings.run, settings.chunk_tokens, settings.chunk_seconds, self.thread.post_rows, self.thread.is_full
        )
        self.prefix_keys = PrefixKeys(settings.max_kv_age)
        self.streams = rank == 0
        """Every rank sees every token; one of them streams."""
        self.sampled_by = weights.version
        """The version behind the step whose result is being processed."""
        if getattr(scheduler, "idle_sleeper", None) is not None:
            scheduler.idle_sleeper.poller.register(self.thread.commit_wakeup.fileno(), 1)
        self.thread.start()

    def turn(self, requests: list[Any] | None) -> list[Any] | None:
        """A turn of the event loop has pulled its requests (None on ranks that do not pull)."""
        now = time.perf_counter()
        self.counters.turn(now)
        self.stream.flush_overdue(now)
        order = self.thread.take_commit_order() if requests is not None else None
        if requests is not None and order is not None:
            requests.append(CommitWeights(*order))
        return requests

    def launch(self, batch: Any) -> None:
        self.counters.launch(time.perf_counter(), batch.forward_mode.is_decode())

    def observe(self, requests: list[Any]) -> None:
        if not self.streams:
            return
        self.counters.aborts += sum(
            self.stream.owns(request.rid) and not request.finished_output and finish_of(request) is Finish.ABORT
            for request in requests
        )
        self.stream.observe(requests, self.sampled_by, time.perf_counter())
        self.counters.generated_tokens = self.stream.tokens

    def told_tokenizer(self, output: Any) -> None:
        """A request that is aborted where no step reports it (in a queue, in mid-prefill, for lack of memory) has its
        abort sent straight to the tokenizer manager."""
        if type(output).__name__ == "AbortReq" and self.streams and self.stream.owns(output.rid):
            self.counters.aborts += 1
            self.stream.abort_waiting(output.rid)

    def commit(self, order: CommitWeights) -> None:
        """SGLang's dispatcher calls this on every rank, in the same turn."""
        stall, problem = 0.0, ""
        try:
            with self.counters.hook():
                stall = self.weights.commit(order.target, order.attempt, self._forward_stream)
            self.counters.commits += 1
        except Exception as error:  # must not end somebody else's scheduler; the publisher is told
            log.exception("commit of version %s failed", order.target)
            problem = f"{type(error).__name__}: {error}"
        self.thread.post_live(order.target, order.attempt, stall, self.scheduler.forward_ct, problem)

    def reloaded(self, version: Version) -> None:
        """SGLang has loaded all weights itself (`weights.delivery = "reload"`)."""
        self.weights.replaced(version)
        self.thread.post_reloaded()

    def _forward_stream(self) -> AbstractContextManager[object]:
        if self.scheduler.device == "cpu":
            return nullcontext()
        context: AbstractContextManager[object] = self.scheduler.device_module.stream(self.scheduler.forward_stream)
        return context


def _trace(scheduler: Any) -> Any:
    """The load map of this rank; every rank calls this, and they exchange what they hold."""
    from engines.sglang.load_map import LoadMap, TensorShape, refuse_derived, trace
    from engines.weights.huggingface_shapes import checkpoint_shapes

    model = scheduler.tp_worker.model_runner.model
    path = pathlib.Path(scheduler.tp_worker.model_runner.model_config.model_path)
    shapes = {name: TensorShape(*shape) for name, shape in checkpoint_shapes(path).items()}
    refuse_derived(model)
    traced = trace(model.named_parameters(), model.load_weights, shapes)
    rank, ranks = scheduler.ps.tp_rank, scheduler.ps.tp_size
    return LoadMap(traced, rank, _gathered(traced.rows(), ranks, scheduler.tp_cpu_group) if ranks > 1 else ())


def _gathered(rows: Any, ranks: int, group: Any) -> list[Any]:
    """[n, 5] int64 of each rank, on each; n differs."""
    import torch
    from torch import distributed

    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
    distributed.all_gather(counts, torch.tensor([len(rows)]), group=group)
    padded = [torch.zeros(int(max(counts)), rows.shape[1], dtype=torch.int64) for _ in range(ranks)]
    mine = torch.zeros_like(padded[0])
    mine[: len(rows)] = rows
    distributed.all_gather(padded, mine, group=group)
    return [some[: int(count)] for some, count in zip(padded, counts, strict=True)]


_plugin: Plugin | None = None


def _guarded(hook: Callable[..., T]) -> Callable[..., T | None]:
    """Hooks run inside somebody else's loop: charge their CPU time, and never raise into it."""

    @functools.wraps(hook)
    def wrapper(*args: Any, **kwargs: Any) -> T | None:
        global _plugin
        plugin = _plugin
        if plugin is None:
            return None
        try:
            with plugin.counters.hook():
                return hook(plugin, *args, **kwargs)
        except Exception:  # a guest must not end its host; counted as a fault, which ends the run by name
            log.exception("hook %s failed; streaming and updates stop, the engine goes on", hook.__name__)
            plugin.counters.faults += 1
            _plugin = None
            return None

    return wrapper


def register() -> None:
    """SGLang calls this in each of its processes.  Without the launcher's settings the plugin does nothing."""
    if (text := os.environ.get(ENVIRONMENT)) is None:
        return
    settings = PluginSettings(**json.loads(text))
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.utils import TypeBasedDispatcher

    def start(_: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """Raises: an engine that cannot be updated must not come up."""
        global _plugin
        _plugin = Plugin(settings, scheduler)
        scheduler._request_dispatcher += TypeBasedDispatcher([(CommitWeights, _plugin.commit)])

    @_guarded
    def pulled(plugin: Plugin, requests: list[Any] | None, *_: Any) -> list[Any] | None:
        return plugin.turn(requests)

    @_guarded
    def before_launch(plugin: Plugin, scheduler: Any, batch: Any, *_: Any, **__: Any) -> None:
        plugin.launch(batch)

    @_guarded
    def after_launch(plugin: Plugin, result: Any, *_: Any, **__: Any) -> None:
        result.stream_rl_version = plugin.weights.version

    @_guarded
    def before_result(plugin: Plugin, scheduler: Any, batch: Any, result: Any) -> None:
        plugin.sampled_by = result.stream_rl_version

    @_guarded
    def before_output(
        plugin: Plugin, streamer: Any, reqs: list[Any], return_logprob: bool, skip_req: Any = None, **_: Any
    ) -> None:
        plugin.observe([request for request in reqs if request is not skip_req])

    @_guarded
    def admitted(plugin: Plugin, scheduler: Any, request: Any, *_: Any, **__: Any) -> None:
        # Chosen here and not by the client, whose choice would race with a commit.  No prefix hit crosses a key:
        # not for the run's requests, and not for an evaluation, which is to measure one version.
        live = plugin.weights.version
        request.extra_key = of_version(live)
        if plugin.stream.owns(request.rid):
            request.extra_key = plugin.prefix_keys.of_segment(request.rid, live)
            plugin.counters.admitted(time.perf_counter())

    @_guarded
    def told_tokenizer(plugin: Plugin, sender: Any, output: Any, *_: Any, **__: Any) -> None:
        plugin.told_tokenizer(output)

    @_guarded
    def paused(plugin: Plugin, *_: Any, **__: Any) -> None:
        plugin.counters.pauses += 1

    @_guarded
    def retracted(plugin: Plugin, result: Any, *_: Any, **__: Any) -> None:
        plugin.counters.retractions += len(result[0])

    @_guarded
    def reloaded(plugin: Plugin, result: Any, updater: Any, request: Any, *_: Any, **__: Any) -> None:
        if result.success:
            history, step = request.weight_version.split(".")  # as the publisher names it
            plugin.reloaded(Version(int(history), int(step)))

    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    parts = "sglang.srt.managers.scheduler_components"
    for target, hook, kind in (
        (f"{scheduler}.__init__", start, HookType.AFTER),
        (f"{parts}.request_receiver.SchedulerRequestReceiver._pull_raw_reqs", pulled, HookType.AFTER),
        (f"{scheduler}.run_batch", before_launch, HookType.BEFORE),
        (f"{scheduler}.run_batch", after_launch, HookType.AFTER),
        (f"{scheduler}.process_batch_result", before_result, HookType.BEFORE),
        (f"{parts}.output_streamer.SchedulerOutputStreamer.stream_output", before_output, HookType.BEFORE),
        (f"{scheduler}.handle_generate_request", admitted, HookType.BEFORE),
        (f"{scheduler}.pause_generation", paused, HookType.BEFORE),
        (f"{parts}.weight_updater.SchedulerWeightUpdaterManager.update_weights_from_disk", reloaded, HookType.AFTER),
        (f"{parts}.output_sender.SenderWrapper.send_output", told_tokenizer, HookType.BEFORE),
        ("sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode", retracted, HookType.AFTER),
    ):
        HookRegistry.register(target, hook, kind)
