"""SGLang's HTTP API, as far as a rollout needs it: token ids in, token ids out.  Imports neither torch nor sglang."""

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Generation:
    """The answer to one request."""

    token_ids: list[int]
    finish: Finish


class EngineClient:
    """One engine's HTTP API over one connection pool."""

    def __init__(self, name: str, address: str, timeout_seconds: float) -> None:
        self.name, self.address = name, address
        self.in_flight = 0
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the queue's admission bounds what is in flight
            timeout=aiohttp.ClientTimeout(total=timeout_seconds),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def generate(self, rid: str, input_ids: Sequence[int], sampling: Mapping[str, Any]) -> Generation:
        """Sample one completion.  Raises EngineError if the engine refuses or cannot be reached, TimeoutError when
        the time is up."""
        body = {"rid": rid, "input_ids": list(input_ids), "sampling_params": dict(sampling), "return_logprob": True}
        self.in_flight += 1
        try:
            async with self._session.post(f"{self.address}/generate", json=body) as response:
                if response.status != 200:
                    raise EngineError(f"{self.name} answered {response.status}: {(await response.text())[:500]}")
                answer = await response.json()
        except aiohttp.ClientError as error:
            raise EngineError(f"{self.name} at {self.address} cannot be reached: {error}") from error
        finally:
            self.in_flight -= 1
        reason = answer["meta_info"]["finish_reason"]["type"]
        return Generation(answer["output_ids"], Finish(reason))

    async def abort(self, rid: str) -> None:
        """Ask the engine to end a request.  `rid` must end in its delimiter: SGLang matches by prefix."""
        try:
            async with self._session.post(f"{self.address}/abort_request", json={"rid": rid}) as response:
                await response.read()
        except aiohttp.ClientError as error:
            raise EngineError(f"{self.name} at {self.address} cannot be reached: {error}") from error
