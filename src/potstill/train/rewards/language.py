"""The language of a completion: whether thinking and answer are in the language of the question."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from potstill.core.errors import DataError
from potstill.data.thinking import split_thinking
from potstill.train.rewards.base import Completion, register_reward
from potstill.train.rewards.detectors import (
    DEFAULT_DETECTOR,
    Detector,
    check_detector,
    check_language,
    open_detector,
)

LANGUAGE_KEY = "language"
MIN_CHARACTERS = 16  # a shorter text counts as consistent
LATEX = re.compile(r"\$\$.*?\$\$|\\\(.*?\\\)|\\\[.*?\\\]|\$[^$\n]*\$", re.DOTALL)


def strip_latex(text: str) -> str:
    r"""A text without the formulas in `$$..$$`, `\(..\)`, `\[..\]` and `$..$`."""
    return LATEX.sub(" ", text)


@register_reward("language", help="1 for a completion in the language of its row, else 0", columns=(LANGUAGE_KEY,))
@dataclass(frozen=True)
class Language:
    """1 where thinking and answer are both in the `language` of the row, else 0.

    Formulas are stripped first. What then has at most 15 characters, or no letter, is consistent. `detector` is a name
    or a function of text, which is called on a few texts to see that it is not random.

    Source: the language consistency of M-Thinker (arXiv:2510.07300), whose released code uses langdetect.

    Raises: UsageError for an unknown or a random detector; MissingDependency if its package is not installed.
    """

    detector: str | Detector = DEFAULT_DETECTOR

    def __post_init__(self) -> None:
        check_detector(self.detect)

    @cached_property
    def detect(self) -> Detector:
        """The detector as a function."""
        return open_detector(self.detector) if isinstance(self.detector, str) else self.detector

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """1 or 0 for each completion. Raises: DataError for a row without a language, or with an unknown one."""
        return [float(self.holds(completion)) for completion in completions]

    def holds(self, completion: Completion) -> bool:
        """Whether a completion is consistent."""
        name = completion.row.get(LANGUAGE_KEY)
        if not isinstance(name, str) or not name.strip():
            raise DataError("a row has no `language`, which the reward compares with; give every row a code such as fr")
        language = check_language(name, self.detect)
        parts = split_thinking(completion.completion) or (completion.completion,)
        return all(self.is_consistent(part, language) for part in parts)

    def is_consistent(self, text: str, language: str) -> bool:
        """Whether a text is in a language, or too short to say."""
        text = strip_latex(text).strip()
        if len(text) < MIN_CHARACTERS or not any(map(str.isalpha, text)):
            return True
        return self.detect(text) == language
