"""SGLang's HTTP API, as far as a rollout needs it: token ids in, token ids out.  Imports neither torch nor sglang."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp

from stream_rl.errors import ConfigError, EngineError
from stream_rl.types import Finish

SAMPLING_WITHOUT_EFFECT_ON_PROBABILITIES = frozenset(
    {"stop_token_ids", "ignore_eos", "no_stop_trim", "skip_special_tokens", "spaces_between_special_tokens"}
)
"""What `[rollout.sampling]` may hold.  SGLang reports log-probs after temperature and before top-p, top-k, min-p and
penalties; a learner that does not correct for those would train on wrong ratios."""


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """Raises ConfigError for a sampling option that the learner's loss has no correction for."""
    if wrong := sorted(set(sampling) - SAMPLING_WITHOUT_EFFECT_ON_PROBABILITIES):
        raise ConfigError(
            f"rollout.sampling: {wrong} would change the distribution without the log-probs saying so, and there is no "
            f"correction for it; allowed are {sorted(SAMPLING_WITHOUT_EFFECT_ON_PROBABILITIES)}; "
            "temperature and max_new_tokens are options of [rollout]"
        )


class EngineUnreachable(EngineError):
    """The engine is not there, or went away before it had answered; another one, or its restart, may do better."""


@dataclass(frozen=True, slots=True)
class Generation:
    """The answer to one request."""

    token_ids: list[int]
    logprobs: list[float]
    """Of each token."""
    finish: Finish


class EngineClient:
    """One engine's HTTP API over one connection pool."""

    def __init__(self, name: str, address: str, timeout_seconds: float) -> None:
        self.name, self.address = name, address
        self.in_flight = 0
        self._session = aiohttp.ClientSession(
            # no limit: the queue's admission bounds what is in flight.  Idle connections are closed before SGLang
            # closes them, after 5 s: one that it is just closing looks like an engine that is gone.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
            timeout=aiohttp.ClientTimeout(total=timeout_seconds),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def generate(self, rid: str, input_ids: Sequence[int], sampling: Mapping[str, Any]) -> Generation:
        """Sample one completion.

        Cancelling this closes the connection, and SGLang then ends the request by itself, within seconds.  Raises
        EngineUnreachable if the engine is not there (any more), EngineError if it refuses the request, TimeoutError
        when the time is up.
        """
        body = {"rid": rid, "input_ids": list(input_ids), "sampling_params": dict(sampling), "return_logprob": True}
        self.in_flight += 1
        try:
            async with self._post("/generate", body) as response:
                text = await response.text(errors="replace")
        finally:
            self.in_flight -= 1
        try:
            answer = json.loads(text)
            token_ids, meta = answer["output_ids"], answer["meta_info"]
            # a request that is aborted before it ran has none
            logprobs = [float(entry[0]) for entry in meta.get("output_token_logprobs") or ()][: len(token_ids)]
            if len(logprobs) < len(token_ids) and meta["finish_reason"]["type"] == Finish.ABORT:
                token_ids = token_ids[: len(logprobs)]
            if len(logprobs) != len(token_ids):
                raise ValueError(f"{len(logprobs)} log-probs for {len(token_ids)} tokens")
            return Generation(token_ids, logprobs, Finish(meta["finish_reason"]["type"]))
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{self.name} answered with no generation ({error!r}): {text[:500]}") from error

    async def abort(self, rid: str) -> None:
        """Ask the engine to end a request; its `generate` then returns what was sampled, with Finish.ABORT.

        `rid` must end in its delimiter: SGLang matches by prefix.  Raises as `generate` does.
        """
        async with self._post("/abort_request", {"rid": rid}) as response:
            await response.read()

    async def parse_function_call(self, text: str, tools: Sequence[Mapping[str, Any]], parser: str) -> dict[str, Any]:
        """SGLang's parser on what the model wrote: {"normal_text", "calls": [{"name", "parameters", "tool_index"}]},
        as the engine has it.  tools: as in OpenAI's chat completions.  Raises as `generate` does."""
        body = {"text": text, "tools": list(tools), "tool_call_parser": parser}
        return await self._parsed("/parse_function_call", body)

    async def separate_reasoning(self, text: str, parser: str) -> dict[str, Any]:
        """SGLang's parser on what the model wrote: {"reasoning_text", "text"}.  Raises as `generate` does."""
        return await self._parsed("/separate_reasoning", {"text": text, "reasoning_parser": parser})

    async def _parsed(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        async with self._post(path, body) as response:
            text = await response.text(errors="replace")
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise EngineError(f"{self.name} answered {path} with no object: {text:.200}")
        return answer

    async def answers(self, timeout: float) -> bool:
        """Whether its HTTP server is up: an engine is known to the queue before that, and for a while after its end."""
        if self._session.closed:
            return False
        try:
            async with asyncio.timeout(timeout), self._session.get(f"{self.address}/model_info") as response:
                return response.status < 500
        except (aiohttp.ClientError, TimeoutError):
            return False

    @asynccontextmanager
    async def _post(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """The engine's answer, if it is one of success."""
        try:
            async with self._session.post(self.address + path, json=body) as response:
                if response.status >= 500:  # SGLang says so while it ends, or of a scheduler that is gone
                    raise EngineUnreachable(await self._answered(response))
                if response.status != 200:
                    raise EngineError(await self._answered(response))
                yield response
        except aiohttp.ClientError as error:
            raise EngineUnreachable(f"{self.name} at {self.address} cannot be reached: {error!r}") from error

    async def _answered(self, response: aiohttp.ClientResponse) -> str:
        text = await response.text(errors="replace")
        return f"{self.name} answered {response.status}: {text[:500]}"
