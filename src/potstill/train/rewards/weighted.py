"""A weighted sum of rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

from potstill.train.rewards.base import (
    TIME_LIMIT,
    Completion,
    CompositeReward,
    Reward,
    RewardScores,
    call_with_limit,
    check_rewards,
    score_completions,
)


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """A reward with its name, its weight, and for that of a user the SHA-256 of its file."""

    name: str
    reward: Reward
    weight: float = 1.0
    columns: tuple[str, ...] = ()
    digest: str = ""


@dataclass(frozen=True)
class RewardSum:
    """r = sum_k w_k r_k for each completion.

    Each term has `time_limit` seconds for a call. A term that is a sum itself also gives the values of its own terms,
    under names such as `m_thinker.language`.
    """

    terms: tuple[RewardTerm, ...]
    time_limit: float = TIME_LIMIT

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """The reward of each completion. Raises: as `score_terms`."""
        return list(self.score_terms(completions).totals)

    def score_terms(self, completions: Sequence[Completion]) -> RewardScores:
        """The rewards and their terms.

        Raises: RewardFailed for a term that raises, hangs, or returns no finite number for each completion.
        """
        totals = [0.0] * len(completions)
        values: dict[str, list[float]] = {}
        for term in self.terms:
            values |= (parts := self._score_term(term, completions))
            totals = [total + term.weight * value for total, value in zip(totals, parts[term.name], strict=True)]
        return RewardScores(totals, values)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        return tuple(dict.fromkeys(column for term in self.terms for column in term.columns))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the terms, such as a package that would help and is missing."""
        return tuple(dict.fromkeys(note for term in self.terms for note in getattr(term.reward, "notes", ())))

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file of a user that defines a term, by the name of the term."""
        return {term.name: term.digest for term in self.terms if term.digest}

    def _score_term(self, term: RewardTerm, completions: Sequence[Completion]) -> dict[str, list[float]]:
        """The values of a term under its name, and of its own terms."""
        if not isinstance(term.reward, CompositeReward):
            values = score_completions(term.reward, completions, name=term.name, time_limit=self.time_limit)
            return {term.name: values}
        scores = call_with_limit(term.reward.score_terms, completions, name=term.name, time_limit=self.time_limit)
        columns = {term.name: scores.totals, **{f"{term.name}.{name}": part for name, part in scores.terms.items()}}
        return {name: check_rewards(column, len(completions), name) for name, column in columns.items()}
