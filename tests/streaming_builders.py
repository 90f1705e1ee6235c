"""SGLang's requests, as far as the stream looks at them."""

from dataclasses import dataclass, field

from stream_rl.types import Version


@dataclass
class Reason:
    kind: str

    def to_json(self) -> dict[str, str]:
        return {"type": self.kind, "matched": "whatever"}


@dataclass
class Logprobs:
    output_token_logprobs_val: list[float] = field(default_factory=list)


@dataclass
class Request:
    """As much of SGLang's request as the stream looks at, and the truth about it."""

    rid: str
    output_ids: list[int] = field(default_factory=list)
    logprob: Logprobs = field(default_factory=Logprobs)
    finished_reason: Reason | None = None
    finished_len: int | None = None
    finished_output: bool = False
    versions: list[Version] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    finished_at: float = 0.0

    def finished(self) -> bool:
        return self.finished_reason is not None

    def sample(self, count: int, version: Version, now: float) -> None:
        for _ in range(count):
            token = 1000 * len(self.rid) + len(self.output_ids)
            self.output_ids.append(token)
            self.logprob.output_token_logprobs_val.append(-token / 7)
            self.versions.append(version)
            self.times.append(now)

    def finish(self, kind: str, now: float, length: int | None = None) -> None:
        self.finished_reason, self.finished_len, self.finished_at = Reason(kind), length, now

    @property
    def length(self) -> int:
        """Tokens that count: of an aborted request those that have a log-prob."""
        if self.finished_reason is not None and self.finished_reason.kind == "abort":
            return len(self.logprob.output_token_logprobs_val)
        return len(self.output_ids) if self.finished_len is None else self.finished_len
