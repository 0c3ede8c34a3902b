"""The accuracy of a completion: whether its final answer is that of its row."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from potstill.core.errors import DataError, RewardFailed, UsageError
from potstill.core.notes import print_warning
from potstill.data.answers import extract_answer, find_boxed, match_answers, read_reference
from potstill.data.math_strings import normalize_math
from potstill.data.thinking import get_answer_part
from potstill.train.rewards.base import Completion, register_reward
from potstill.train.rewards.verifier import MathVerifier, Verdict, is_installed

ANSWER_KEY = "answer"
COMPATIBILITIES = ("clean", "official")
MATHEMATICS = re.compile(r"\d|[\\^=+*/<>(){}\[\]]")  # math-verify reads words as products of letters
MIN_FAILURES = 8  # comparisons that must all fail before a run is stopped
MISSING_NOTE = (
    "math-verify is not installed, so answers that are no numbers are compared as strings; run: "
    "pip install 'potstill[align]'"
)


@dataclass(frozen=True)
class Accuracy:
    r"""1 for a completion with the `answer` of its row, else 0.

    The answer is the content of the last `\boxed{}`, else the last number, of what follows the thinking. Numbers are
    compared by value and words as strings. What is neither, such as a formula, math-verify compares if it is installed;
    without it such answers are compared as strings. `failures` counts what math-verify could not compare, by reason.

    With `compat="official"` the last `\boxed{}` of the whole completion must equal the answer as a string, after the
    normalization of MATH. That is the accuracy of M-Thinker's released code (arXiv:2510.07300).

    Raises: UsageError for another `compat`.
    """

    compat: str = "clean"
    verifier: MathVerifier | None = None
    failures: Counter[str] = field(default_factory=Counter, repr=False)

    def __post_init__(self) -> None:
        if self.compat not in COMPATIBILITIES:
            raise UsageError(f"compat is {self.compat!r}; it can be {' or '.join(COMPATIBILITIES)}")

    @property
    def notes(self) -> tuple[str, ...]:
        """That math-verify is missing, where it is."""
        return (MISSING_NOTE,) if self.compat == "clean" and self.math_verifier is None else ()

    @cached_property
    def math_verifier(self) -> MathVerifier | None:
        """math-verify; None where it is not installed."""
        return self.verifier or (MathVerifier() if is_installed() else None)

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """1 or 0 for each completion.

        Raises: DataError for a row without an answer; RewardFailed if math-verify does not work.
        """
        verdicts = [self.compare(completion) for completion in completions]
        failures = [verdict.failure for verdict in verdicts if verdict.failure]
        if len(failures) >= MIN_FAILURES and len(failures) == len(verdicts):
            raise RewardFailed(f"math-verify {failures[-1]} for all {len(failures)} answers; reinstall it, or omit it")
        return [float(verdict.equal) for verdict in verdicts]

    def compare(self, completion: Completion) -> Verdict:
        """The verdict on a completion. Raises: as `__call__`."""
        value = completion.row.get(ANSWER_KEY)
        if value is None or not str(value).strip():
            raise DataError("a row has no `answer` to compare with; give every row one, or choose another reward")
        reference = read_reference(value)
        if self.compat == "official":
            box = find_boxed(completion.completion)
            return Verdict(box is not None and normalize_math(box) == normalize_math(reference))
        answer = extract_answer(get_answer_part(completion.completion))
        if answer is None:
            return Verdict(False)
        is_equal = match_answers(answer, reference)
        return Verdict(is_equal) if is_equal is not None else self._verify(reference, answer)

    def _verify(self, reference: str, answer: str) -> Verdict:
        """The verdict of math-verify on what is no pair of numbers; a failure counts as different."""
        if self.math_verifier is None or not (MATHEMATICS.search(reference) and MATHEMATICS.search(answer)):
            return Verdict(False)
        verdict = self.math_verifier.verify(reference, answer)
        if verdict.failure:
            if verdict.failure not in self.failures:
                print_warning(f"math-verify {verdict.failure} on {answer[:80]!r}, which counts as a wrong answer")
            self.failures[verdict.failure] += 1
        return verdict


@register_reward("accuracy", help="1 for the right answer, else 0", columns=(ANSWER_KEY,))
def build_accuracy(compat: str = "clean") -> Accuracy:
    """The accuracy with the options that a text can state. Raises: as `Accuracy` does."""
    return Accuracy(compat)
