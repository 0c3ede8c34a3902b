"""Which samples are right."""

from collections.abc import Sequence

from potstill.stages.candidates.questions import Question
from potstill.stages.candidates.sampler import Candidate
from potstill.train.rewards.base import Completion
from potstill.train.rewards.weighted import RewardSum

NO_SAMPLES = "no sample that ended, or a prompt that is too long"


def find_right(reward: RewardSum, question: Question, candidates: Sequence[Candidate]) -> list[bool]:
    """Whether each sample ended and has at least 1 of every term of the reward.

    Raises: as `RewardSum.score_terms` does.
    """
    completions = [Completion(question.text, candidate.text, question.row, candidate.ended) for candidate in candidates]
    terms = reward.score_terms(completions).terms
    return [
        candidate.ended and all(terms[term.name][n] >= 1 for term in reward.terms)
        for n, candidate in enumerate(candidates)
    ]
