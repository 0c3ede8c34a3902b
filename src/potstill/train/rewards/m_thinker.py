"""The rewards of M-Thinker: language consistency, accuracy and the alignment of thinking, behind a gate.

Source: M-Thinker (arXiv:2510.07300) and its released code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from potstill.train.rewards.accuracy import ANSWER_KEY, Accuracy
from potstill.train.rewards.base import Completion, Judge, RewardScores, register_reward
from potstill.train.rewards.detectors import DEFAULT_DETECTOR, Detector
from potstill.train.rewards.format import MIN_CHARACTERS, Format
from potstill.train.rewards.language import LANGUAGE_KEY, Language
from potstill.train.rewards.thinking import Thinking, get_solution
from potstill.train.rewards.weighted import RewardSum, RewardTerm

COLUMNS = (ANSWER_KEY, LANGUAGE_KEY)


@register_reward(
    "m_thinker",
    help="language, then the right answer, then the thinking of a solution: -1, 0, or 1 to 2",
    columns=COLUMNS,
)
@dataclass(frozen=True, kw_only=True)
class MThinker:
    r"""R = R_lc + R_acc + R_cta, in {-1, 0} and [1, 2].

        R_lc   0 for a completion of the right form whose thinking and answer are in the language of the row, else -1
        R_acc  1 for the right answer where R_lc = 0, else 0
        R_cta  the alignment of the thinking where R_acc = 1 and the row has a `solution`, else 0

    The form is that of `Format`, with `minimum` characters; thinking is compared by `Thinking`, with its `judge`. With
    `compat="official"` the last `\boxed{}` is compared as a string, as the released code does; give
    `detector="langdetect"` for its detector.

    Raises: UsageError, MissingDependency, as the rewards that it is made of.
    """

    minimum: int = MIN_CHARACTERS
    detector: str | Detector = DEFAULT_DETECTOR
    judge: Judge | None = None
    compat: str = "clean"

    def __post_init__(self) -> None:
        _ = self.rewards

    @cached_property
    def rewards(self) -> tuple[Format, Language, Accuracy, Thinking]:
        """The rewards that it is made of."""
        return Format(minimum=self.minimum), Language(self.detector), Accuracy(self.compat), Thinking(self.judge)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the accuracy."""
        return self.rewards[2].notes

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """R for each completion. Raises: as the rewards that it is made of."""
        return list(self.score_terms(completions).totals)

    def score_terms(self, completions: Sequence[Completion]) -> RewardScores:
        """R, and its terms: R_lc, R_acc behind the gate of form and language, and R_cta. Raises: as `__call__`."""
        form, language, accuracy, thinking = self.rewards
        consistent = [n for n, c in enumerate(completions) if form.holds(c.completion) and language.holds(c)]
        right = select_right(accuracy, completions, consistent)
        comparable = [n for n in right if get_solution(completions[n].row)]
        scores = dict(zip(comparable, thinking([completions[n] for n in comparable]), strict=True))
        terms = {
            "language": [0.0 if n in consistent else -1.0 for n in range(len(completions))],
            "gated_accuracy": [float(n in right) for n in range(len(completions))],
            "thinking": [scores.get(n, 0.0) for n in range(len(completions))],
        }
        return RewardScores([sum(values) for values in zip(*terms.values(), strict=True)], terms)


def select_right(accuracy: Accuracy, completions: Sequence[Completion], indices: Sequence[int]) -> list[int]:
    """Those of `indices` whose completions have the right answer."""
    values = accuracy([completions[n] for n in indices])
    return [n for n, value in zip(indices, values, strict=True) if value]


@register_reward("slc_rl", help="0.9 * accuracy + 0.1 * language; right English answers pass", columns=COLUMNS)
def build_slc_rl(detector: str = DEFAULT_DETECTOR) -> RewardSum:
    """0.9 accuracy + 0.1 language: the soft language consistency that M-Thinker compares with."""
    accuracy = RewardTerm(name="accuracy", weight=0.9, reward=Accuracy())
    return RewardSum((accuracy, RewardTerm(name="language", weight=0.1, reward=Language(detector))))
