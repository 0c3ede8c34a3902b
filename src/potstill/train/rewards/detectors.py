r"""Detectors of the language of a text: functions that give its code, such as `fr`, or "" for none or several.

py3langid is the default: it classifies the whole text and then each piece of about 30 characters, without digits and
operators. A piece that is surely of another language makes the text one of several. langdetect is that of M-Thinker's
released code: a text has a language if langdetect names no other. It draws random numbers, so it gets a seed; without
one it gives a text several answers, and potstill refuses such detectors.

Source: Lui and Baldwin, "langid.py" (https://aclanthology.org/P12-3005); https://github.com/Mimino666/langdetect.
"""

import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol, TypeAlias, runtime_checkable

from potstill.core.errors import DataError, MissingDependency, UsageError
from potstill.core.suggestions import suggest

Detector: TypeAlias = Callable[[str], str]

DEFAULT_DETECTOR = "py3langid"
SEED = 42  # of langdetect, in the released code of M-Thinker
PIECE_CHARACTERS = 30
MIN_PROBABILITY = 0.2  # of the language of a text; below it the text has none
MIN_PIECE_PROBABILITY = 0.9  # of another language in a piece, which makes the text one of several
SYMBOLS = re.compile(r"[\d=+*/<>%$^_{}\\|~#\[\]\s]+")  # what has no language
SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*|\n+")
VARIANTS = {"yue": "zh", "wuu": "zh", "zh-cn": "zh", "nn": "no", "nb": "no"}  # what counts as one language
PROBES = (  # texts between languages, on which a random detector wavers
    *("no son le la de 12 me", "a de en un 7 os", "die man in so am an", "se o me te 4 da", "van de la per no"),
    *("il est un son de mas", "is in an de op te", "so e da no a um il", "me on te la so in"),
)
PROBE_CALLS = 6


@runtime_checkable
class ListedDetector(Protocol):
    """A detector that knows its `languages`, so that a misspelled one can be refused."""

    languages: frozenset[str]

    def __call__(self, text: str) -> str: ...


def open_detector(name: str, *, seed: int = SEED) -> Detector:
    """The detector of that name: py3langid or langdetect.

    Raises: UsageError for another name; MissingDependency if its package is not installed.
    """
    if name not in DETECTORS:
        hint = suggest(name, DETECTORS)
        raise UsageError(f"there is no language detector {name!r}{hint}; choose one of {', '.join(DETECTORS)}")
    if find_spec(name) is None:
        raise MissingDependency(f"{name} is not installed; run: pip install 'potstill[align]'")
    return DETECTORS[name](seed)


class Py3langid:
    """py3langid on a whole text and on its pieces; it draws no random numbers."""

    def __init__(self) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        self.languages = frozenset(map(normalize_language, self._identifier.labels))

    def __call__(self, text: str) -> str:
        """The language of a text; "" where it is uncertain, or where a piece is surely of another one."""
        text = SYMBOLS.sub(lambda match: "\n" if "\n" in match[0] else " ", text)
        language, probability = self._classify(text)
        if probability < MIN_PROBABILITY:
            return ""
        pieces = (self._classify(piece) for piece in cut_pieces(text, PIECE_CHARACTERS))
        return "" if any(label != language and p >= MIN_PIECE_PROBABILITY for label, p in pieces) else language

    def _classify(self, text: str) -> tuple[str, float]:
        label, probability = self._identifier.classify(text)
        return normalize_language(label), float(probability)


class Langdetect:
    """langdetect with a seed of its own, which leaves the global one as it is."""

    def __init__(self, seed: int | None) -> None:
        from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

        self._factory: Any = DetectorFactory()
        self._factory.load_profile(PROFILES_DIRECTORY)
        self._factory.set_seed(seed)
        self.languages = frozenset(map(normalize_language, self._factory.get_lang_list()))

    def __call__(self, text: str) -> str:
        """The only language of a text; "" where langdetect finds none or several."""
        from langdetect.lang_detect_exception import LangDetectException

        detector = self._factory.create()
        detector.append(text)
        try:
            languages = detector.get_probabilities()
        except LangDetectException:  # a text without letters
            return ""
        return normalize_language(languages[0].lang) if len(languages) == 1 else ""


DETECTORS: dict[str, Callable[[int], Detector]] = {
    "py3langid": cache(lambda seed: Py3langid()),
    "langdetect": cache(Langdetect),
}


def cut_pieces(text: str, size: int) -> list[str]:
    """The sentences of a text, joined to pieces of at least `size` characters; a short rest stays with the last."""
    pieces: list[str] = []
    current = ""
    for sentence in filter(None, SENTENCE_END.split(text)):
        current = f"{current} {sentence}".strip()
        if len(current) >= size:
            pieces.append(current)
            current = ""
    if not current:
        return pieces
    return [*pieces[:-1], f"{pieces[-1]} {current}"] if pieces else [current]


def normalize_language(name: str) -> str:
    """A code of a language without its region: `pt-BR` is pt and `zh_CN` zh; `zh-tw` stays."""
    code = name.strip().lower().replace("_", "-")
    code = VARIANTS.get(code, code)
    return code if code == "zh-tw" else VARIANTS.get(code.partition("-")[0], code.partition("-")[0])


def check_language(name: str, detector: Detector) -> str:
    """The code of a language, if the detector may know it.

    Raises: DataError.
    """
    code = normalize_language(name)
    if isinstance(detector, ListedDetector) and code not in detector.languages:
        hint = suggest(code, detector.languages)
        raise DataError(
            f"the language {name!r} of a row is unknown to its detector{hint}; write a code such as "
            f"{', '.join(sorted({'en', 'fr', 'ja', 'zh'} & detector.languages))}"
        )
    return code


def check_detector(detector: Detector) -> None:
    """Refuse a detector that gives one text different languages.

    Raises: UsageError.
    """
    for text in PROBES:
        answers = {detector(text) for _ in range(PROBE_CALLS)}
        if len(answers) > 1:
            raise UsageError(
                f"the language detector is random: it gives {text!r} the languages "
                f"{' and '.join(map(repr, sorted(answers)))}; seed it"
            )
