"""A weighted sum of rewards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from potstill.train.rewards.base import (
    TIME_LIMIT,
    Completion,
    CompositeReward,
    Reward,
    call_with_limit,
    check_rewards,
    score_completions,
)


class RewardScores(NamedTuple):
    """The reward of each completion, and by name the values of every term that entered it, without weights."""

    totals: list[float]
    terms: Mapping[str, list[float]]


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
        """The reward of each completion. Raises: as `score`."""
        return self.score(completions).totals

    def score(self, completions: Sequence[Completion]) -> RewardScores:
        """The rewards and their terms.

        Raises: RewardFailed for a term that raises, hangs, or returns no finite number for each completion.
        """
        totals = [0.0] * len(completions)
        values: dict[str, list[float]] = {}
        for term in self.terms:
            values |= (parts := self._score_term(term, completions))
            totals = [total + term.weight * value for total, value in zip(totals, parts[term.name], strict=True)]
        return RewardScores(totals, values)

    def score_terms(self, completions: Sequence[Completion]) -> dict[str, list[float]]:
        """The weighted values of each term by name, whose sum is the reward."""
        values = self.score(completions).terms
        return {term.name: [term.weight * value for value in values[term.name]] for term in self.terms}

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
        parts = call_with_limit(term.reward.score_terms, completions, name=term.name, time_limit=self.time_limit)
        values_by_term = {
            f"{term.name}.{name}": check_rewards(part, len(completions), f"{term.name}.{name}")
            for name, part in parts.items()
        }
        totals = [sum(values) for values in zip(*values_by_term.values(), strict=True)] if values_by_term else []
        return {term.name: check_rewards(totals, len(completions), term.name), **values_by_term}
