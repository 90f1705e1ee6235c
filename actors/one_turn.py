"""The simplest episode: one turn behind the prompt, and a reward for it."""

from actors.episodes import Episode
from actors.rewards import RewardPool, Score
from actors.sampling import Sampling


class OneTurn:
    """Plays tasks that have `reward`."""

    def __init__(self, rewards: RewardPool, sampling: Sampling) -> None:
        self._rewards, self._sampling = rewards, sampling

    async def play(self, episode: Episode) -> Score:
        """Raises RewardFailure, EpisodeEnded, ContextFull."""
        budgets = episode.prompt.max_new_tokens
        budget = budgets[min(episode.member, len(budgets) - 1)] if budgets else 0
        _, sampled = await episode.turn(None, self._sampling.encode(episode.prompt.text), max_new_tokens=budget)
        return await self._rewards.score(episode.prompt, self._sampling.decode(sampled.token_ids))
