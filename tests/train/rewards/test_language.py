"""The language of completions: official and default detectors, and the traps of both."""

from itertools import cycle

import pytest

from potstill.core.errors import DataError, MissingDependency, UsageError
from potstill.train.rewards import detectors
from potstill.train.rewards.base import Completion
from potstill.train.rewards.detectors import Langdetect, cut_pieces, open_detector
from potstill.train.rewards.language import Language, strip_latex

FRENCH = "Le train part de la gare à huit heures et arrive à midi, donc le voyage dure quatre heures en tout."
ENGLISH = "The train leaves the station at eight and arrives at noon, so the journey takes four hours in all."
CHINESE = "火车早上八点从车站出发，中午到达，所以整个旅程需要四个小时。这个答案很容易检查。"
DETECTORS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            detectors.find_spec(name) is None, reason=f"{name} is not installed; run: pip install 'potstill[align]'"
        ),
    )
    for name in detectors.DETECTORS
]


def complete(text: str, language: str | None) -> Completion:
    return Completion("", text, {"language": language}, ended=True)


def detect_words(text: str) -> str:
    """French for `donc`, English for `so`, none for both or neither."""
    names = [name for name, word in (("fr", "donc"), ("en", "so")) if word in text.split()]
    return names[0] if len(names) == 1 else ""


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_names_one_language_or_none(name: str) -> None:
    detector = open_detector(name)
    assert [detector(text) for text in (FRENCH, ENGLISH, CHINESE)] == ["fr", "en", "zh"]
    assert detector(FRENCH) == open_detector(name)(FRENCH)


@pytest.mark.parametrize("name", DETECTORS)
def test_thinking_and_answer_must_both_be_in_the_language(name: str) -> None:
    language = Language(name)
    texts = [f"{FRENCH}</think>{FRENCH}", f"{ENGLISH}</think>{FRENCH}", f"{FRENCH}</think>{ENGLISH}", FRENCH, ENGLISH]
    assert language([complete(text, "fr") for text in texts]) == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert language([complete(CHINESE, "zh-CN"), complete(CHINESE, "zh_cn"), complete(CHINESE, "ja")]) == [1, 1, 0]


def test_one_foreign_sentence_makes_a_text_one_of_several() -> None:
    pytest.importorskip("py3langid", reason="py3langid is not installed; run: pip install 'potstill[align]'")
    detector = open_detector("py3langid")
    assert detector(" ".join([FRENCH] * 4)) == "fr"
    assert detector(" ".join([FRENCH] * 4 + [ENGLISH])) == detector(f"{FRENCH}\n{CHINESE}\n{ENGLISH}") == ""


def test_formulas_are_no_text() -> None:
    text = r"so $x^2 = 4$, \(y\) and \[z\] or $$\text{donc}$$ hold"
    assert strip_latex(text).split() == ["so", ",", "and", "or", "hold"]
    assert Language(detect_words)([complete(rf"$donc$ {text}", "en")]) == [1.0]


@pytest.mark.parametrize(
    ("text", "is_consistent"),
    [
        ("so it is 12, yes", False),
        ("so, that is 12.", True),
        (" " * 9 + "so it's 12" + " " * 9, True),
        ("1 " * 40, True),
    ],
)
def test_a_text_of_15_characters_or_without_letters_is_consistent(text: str, is_consistent: bool) -> None:
    assert Language(detect_words)([complete(text, "fr")]) == [float(is_consistent)]


def test_a_language_that_is_unknown_or_missing_is_refused_with_one_sentence() -> None:
    pytest.importorskip("py3langid", reason="py3langid is not installed; run: pip install 'potstill[align]'")
    with pytest.raises(DataError, match=r"the language 'klingon' of a row is unknown to its detector.*such as en, fr"):
        Language()([complete(FRENCH, "klingon")])
    for missing in (None, ""):
        with pytest.raises(DataError, match="a row has no `language`"):
            Language()([complete(FRENCH, missing)])


def test_a_detector_that_is_random_is_refused() -> None:
    answers = cycle(["fr", "en"])
    with pytest.raises(UsageError, match=r"the language detector is random: it gives .* 'en' and 'fr'; seed it"):
        Language(lambda text: next(answers))


def test_langdetect_without_a_seed_is_refused_as_random() -> None:
    pytest.importorskip("langdetect", reason="langdetect is not installed; run: pip install 'potstill[align]'")
    with pytest.raises(UsageError, match="is random"):
        Language(Langdetect(None))
    Language("langdetect")


def test_a_missing_detector_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detectors, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"py3langid is not installed; run: pip install 'potstill\[align\]'"):
        Language()


def test_pieces_are_whole_sentences_of_the_least_length() -> None:
    assert cut_pieces("One. Two three. Four five six seven. No", 10) == ["One. Two three.", "Four five six seven. No"]
    assert cut_pieces("短い。", 10) == ["短い。"]
    assert cut_pieces("", 10) == []
