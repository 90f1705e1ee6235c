"""Ready groups, and how a lease is made of them.

A lease serves one named step.  It takes the oldest ready groups first and stops at the first that no longer fits;
only while it is still below `min_tokens` it looks further down the line, since a step on too few tokens is worse than
one group trained a step later.  What it passed over stays first in line.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from queues.trajectories import APPENDED, Group
from queues.versions import Histories
from stream_rl.config import Queue
from stream_rl.messages import Lease
from stream_rl.types import Version


class Ready:
    """Groups in the order in which they became ready, with their trainable tokens at the step being awaited."""

    def __init__(self, histories: Histories, queue: Queue) -> None:
        self._histories = histories
        self._queue = queue
        self._trainable: dict[Group, int] = {}
        self._step = histories.last
        self.trainable_tokens = 0
        """Of all ready groups, at the step being awaited."""

    def __len__(self) -> int:
        return len(self._trainable)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._trainable)

    def add(self, group: Group) -> None:
        """Last in line."""
        self.refresh()
        self._trainable[group] = self.count(group)
        self.trainable_tokens += self._trainable[group]

    def discard(self, group: Group) -> None:
        self.trainable_tokens -= self._trainable.pop(group, 0)

    def refresh(self) -> None:
        """Tokens have aged if the step being awaited moved."""
        if self._step != self._histories.last:
            self._recount()

    def hopeless(self) -> list[Group]:
        """Groups in which nothing may train any more."""
        return [group for group, trainable in self._trainable.items() if not trainable]

    def choose(self, min_tokens: int, max_tokens: int) -> list[Group]:
        """Groups of the next lease, at least one; see the module."""
        chosen: list[Group] = []
        total = trainable = 0
        for group, count in self._trainable.items():
            if chosen and total + group.total_tokens > max_tokens:
                if trainable >= min_tokens:
                    break
                continue
            chosen.append(group)
            total += group.total_tokens
            trainable += count
            if total >= max_tokens:
                break
        return chosen

    def _recount(self) -> None:
        self._step = self._histories.last
        self._trainable = {group: self.count(group) for group in self._trainable}
        self.trainable_tokens = sum(self._trainable.values())

    def count(self, group: Group) -> int:
        """Tokens of a whole group that may train at the step being awaited."""
        max_age = max_token_age(self._queue, group.task)
        if max_age < 0:
            return sum(group.versions.values())
        oldest = self._histories.last.step - max_age
        effective = self._histories.effective_step
        return sum(count for version, count in group.versions.items() if effective(*version) >= oldest)


def max_token_age(queue: Queue, task: str) -> int:
    """The bound for a task's tokens, in versions; -1 if there is none."""
    return queue.max_token_age_of.get(task, queue.max_token_age)


def build_lease(step: Version, groups: Sequence[Group], histories: Histories, queue: Queue) -> Lease:
    """The groups' surviving trajectories as columns, every token's age marked for `step`."""
    trajectories = [(group, t) for group in groups for t in group.survivors()]
    lengths = np.array([t.num_tokens for _, t in trajectories], dtype=np.int32)
    total = int(lengths.sum(dtype=np.int64))
    token_ids, columns = np.zeros(total, np.int32), np.zeros((3, total), np.int32)
    histories_T, steps_T, ages_T = columns
    sampled, logprobs = np.zeros(total, np.uint8), np.zeros(total, np.float32)
    at = 0
    for _, t in trajectories:
        prompt = t.context
        token_ids[at : at + len(prompt)] = prompt
        at += len(prompt)
        here = slice(at, at + len(t.ids) // 4)
        token_ids[here] = np.frombuffer(t.ids, np.int32)
        logprobs[here] = np.frombuffer(t.logprobs, np.float32)
        for history, sampled_at, count in t.spans:
            if (history, sampled_at) != APPENDED:
                run = slice(at, at + count)
                sampled[run] = 1
                histories_T[run] = history
                steps_T[run] = sampled_at
                ages_T[run] = step.step - histories.effective_step(history, sampled_at)
            at += count
    assert at == total, f"spans cover {at} tokens of {total}"
    # Chunks of unpublished versions are refused, and a fork is never ahead of the step that follows it.
    assert not total or ages_T.min() >= 0, f"a token is younger than step {step}"
    bounds = np.array([max_token_age(queue, group.task) for group, _ in trajectories], dtype=np.int32)
    bound_T = np.repeat(bounds, lengths)
    trainable = sampled & ((bound_T < 0) | (ages_T <= bound_T))
    return Lease(
        step=step,
        groups=np.array([group.id for group, _ in trajectories], dtype=np.int64),
        members=np.array([t.member for _, t in trajectories], dtype=np.int32),
        episodes=np.array([t.episode for _, t in trajectories], dtype=np.int32),
        rewards=np.array([t.reward for _, t in trajectories], dtype=np.float32),
        max_token_ages=bounds,
        lengths=lengths,
        token_ids=token_ids,
        sampled=sampled,
        trainable=trainable.astype(np.uint8),
        logprobs=logprobs,
        histories=histories_T,
        steps=steps_T,
        ages=ages_T,
    )
