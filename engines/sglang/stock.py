"""SGLang servers without our plugin, fed through their own endpoints: a checkpoint on disk, and a pause to load it.

    pause in_place -> [begin] -> update_weights_from_disk -> [end] -> continue

Requests live through it with what they have in the KV cache, and each goes on under the new weights.  From 0.5.20 on
the answers say which version each token has.  `begin` and `end` are for servers that say they want a session around an
update; 0.5.15 to 0.5.23 want none around a checkpoint from disk, and the last of them would pack the weights of
quantised models a second time in one.

On a GPU the forward pass that runs when the pause begins may still be running when the first weights are written: the
scheduler does not wait for it.  Where one token's log-prob in such a pass matters, start the server with
SGLANG_FORCE_COARSE_WAR_BARRIER=1 (0.5.20 and later), or give it the plugin.
"""

import asyncio
import json
import pathlib
import shutil
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import torch

from engines.megatron import checkpoint
from stream_rl.types import Version

CONTINUE_ATTEMPTS = 2
"""A server that misses the first stays paused until the next version."""
KEPT = 2
"""Checkpoints: a server that was given up may still be reading the one before."""


@dataclass(frozen=True, slots=True)
class Call:
    path: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    """0 if none came."""
    text: str

    @property
    def well(self) -> bool:
        return self.status == 200

    @property
    def wants_session(self) -> bool:
        return not self.well and "begin_weight_update" in self.text


@dataclass(frozen=True, slots=True)
class Outcome:
    problem: str
    session: bool
    """Whether the server wants one."""


@dataclass(frozen=True, slots=True)
class StockUpdate:
    """What one update of one server came to."""

    version: Version
    pause_seconds: float
    """From asking the server to pause until it had answered that it went on."""
    write_seconds: float
    """Of the checkpoint; 0 if it was there already."""
    problem: str
    """Why the server does not have the version, or is still paused; "" if it has."""


PAUSE = Call("/pause_generation", {"mode": "in_place"})
BEGIN = Call("/begin_weight_update", {})
END = Call("/end_weight_update", {})
CONTINUE = Call("/continue_generation", {"torch_empty_cache": False})


def update_call(directory: pathlib.Path, version: Version) -> Call:
    # flushing the cache while requests run ends a server of 0.5.20 or before
    body = {"model_path": str(directory), "flush_cache": False, "weight_version": str(version)}
    return Call("/update_weights_from_disk", body)


def conversation(update: Call, session: bool) -> Generator[Call, Answer, Outcome]:
    """What to ask a server, one call after the other, given its answers.  Ends with `continue`, whatever they are."""
    answer = yield PAUSE
    if answer.well and not session:
        answer = yield update
        session = answer.wants_session
    if session and (answer.well or answer.wants_session):
        answer = yield BEGIN
        if answer.well or "already open" in answer.text:
            answer = yield update
            ended = yield END
            answer = ended if answer.well else answer
    problem = "" if answer.well else answer.text
    for _ in range(CONTINUE_ATTEMPTS):
        if (answer := (yield CONTINUE)).well:
            return Outcome(problem, session)
    return Outcome(f"{problem or answer.text}; it may still be paused: POST {CONTINUE.path} to it", session)


class StockServer:
    """One server.  `update` is not for two tasks at once."""

    def __init__(self, url: str, model: pathlib.Path, scratch: pathlib.Path, timeout_s: float) -> None:
        """model: the directory whose configuration and tokenizer go with the weights.  scratch: a folder of this
        server's own, which it must see under the same path.  timeout_s: for each answer."""
        self.url = url.rstrip("/")
        self._model, self._scratch = model, scratch
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session = False
        self._written: Version | None = None

    async def update(self, version: Version, tensors: Iterable[tuple[str, torch.Tensor]]) -> StockUpdate:
        """Bring the server to `version`, whose tensors have their names and shapes in a Hugging Face checkpoint.

        Raises WeightsError if the checkpoint cannot be written; what the server answers is in the result.
        """
        start = time.monotonic()
        directory = await asyncio.to_thread(self._write, version, tensors)
        paused = time.monotonic()
        async with aiohttp.ClientSession(timeout=self._timeout) as http:
            outcome = await self._converse(http, conversation(update_call(directory, version), self._session))
        self._session = outcome.session
        return StockUpdate(version, time.monotonic() - paused, paused - start, outcome.problem)

    async def _converse(self, http: aiohttp.ClientSession, talk: Generator[Call, Answer, Outcome]) -> Outcome:
        call = next(talk)
        try:
            while True:
                answer = await self._post(http, call)
                call = talk.send(answer)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
        except asyncio.CancelledError:
            await self._post(http, CONTINUE)  # whoever else uses the server did not ask for our end
            raise

    async def _post(self, http: aiohttp.ClientSession, call: Call) -> Answer:
        try:
            async with http.post(self.url + call.path, json=call.body) as response:
                text = await response.text()
                return Answer(response.status, f"{self.url}{call.path} answered {response.status}: {_said(text)}")
        except (aiohttp.ClientError, TimeoutError) as error:
            return Answer(0, f"{self.url}{call.path} gave no answer: {error!r}")

    def _write(self, version: Version, tensors: Iterable[tuple[str, torch.Tensor]]) -> pathlib.Path:
        """A checkpoint of its own for each version: a server that reads one while it is replaced would mix two."""
        directory = self._scratch / f"version-{version.history}-{version.step}"
        if version != self._written:
            checkpoint.save_checkpoint(directory, tensors, self._model)
            self._written = version
            by_age = sorted(self._scratch.glob("version-*"), key=lambda path: path.stat().st_mtime_ns)
            for path in by_age[:-KEPT]:
                shutil.rmtree(path, ignore_errors=True)
        return directory


def _said(text: str) -> str:
    """SGLang's own words, out of its JSON."""
    try:
        return str(json.loads(text)["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return text[:500]
