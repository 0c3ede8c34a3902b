"""The detectors of the reward `language` on real text: wrong languages, foreign sentences that are missed, and time.

The texts are news in seven languages (NTREX), math questions in eleven (MGSM), and English solutions full of equations
(GSM8K), all from `$POTSTILL_DATA`. A mixed text is six sentences of news, of which one is in another language.

    python benchmarks/language_detectors.py --json
"""

import gzip
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from potstill.train.rewards.detectors import DETECTORS, Detector, open_detector
from setting.document import command_line, document, parse_arguments, refuse_on_red

RESTS_ON = ["tests/train/rewards/test_language.py"]
NEWS = "translation/MicrosoftTranslator__NTREX/NTREX-128/newstest2019-{}.txt.gz"
NEWS_FILES = {
    "de": "ref.deu",
    "en": "src.eng",
    "fr": "ref.fra",
    "ja": "ref.jpn",
    "ko": "ref.kor",
    "pt": "ref.por",
    "zh": "ref.zho-CN",
}
QUESTIONS = "math/google-research__url-nlp/mgsm/mgsm_{}.tsv"
QUESTION_LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
SOLUTIONS = "math/openai__grade-school-math/grade_school_math/data/train.jsonl.gz"
SENTENCES, TEXTS, SOLUTION_COUNT = 6, 60, 500  # of a text; texts of each language; solutions
GOAL = "py3langid is wrong on 1 % of each kind of text or less"
MIXED_GOAL = "py3langid misses fewer mixed texts than langdetect"


class Text(NamedTuple):
    """A text and its language."""

    text: str
    language: str


def main() -> None:
    """Refuses if a test fails, measures both detectors, prints one document."""
    options = parse_arguments(command_line(__doc__))
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    if not (folder := os.environ.get("POTSTILL_DATA")):
        sys.exit("POTSTILL_DATA is unset: the texts are not part of the project")
    texts, mixed = read_texts(Path(folder)), mix_news(read_news(Path(folder)))
    figures = {name: measure(open_detector(name), texts, mixed) for name in DETECTORS}
    ours, other = figures["py3langid"], figures["langdetect"]
    met = {GOAL: max(ours[name] for name in texts) <= 0.01, MIXED_GOAL: ours["mixed, missed"] < other["mixed, missed"]}
    print(document("language_detectors", figures, met))


def read_news(folder: Path) -> dict[str, list[str]]:
    """The sentences of the news by language."""
    return {language: read_lines(folder / NEWS.format(name)) for language, name in NEWS_FILES.items()}


def read_lines(file: Path) -> list[str]:
    """The lines of a compressed file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return lines.read().splitlines()


def read_texts(folder: Path) -> dict[str, list[Text]]:
    """The texts of one language each, by their kind."""
    news = read_news(folder)
    lines = read_lines(folder / SOLUTIONS)
    return {
        "news": [Text(join(part), language) for language in news for part in cut(news[language])],
        "sentences": [Text(sentence, language) for language in news for sentence in news[language][:400]],
        "questions": [
            Text(line.split("\t")[0], language)
            for language in QUESTION_LANGUAGES
            for line in (folder / QUESTIONS.format(language)).read_text(encoding="utf-8").splitlines()
        ],
        "solutions": [Text(json.loads(line)["answer"], "en") for line in lines[:SOLUTION_COUNT]],
    }


def mix_news(news: Mapping[str, Sequence[str]]) -> list[Text]:
    """Texts in which one of the sentences is in another language, with the language of the others."""
    draw = random.Random(1)
    texts = []
    for language in news:
        for part in cut(news[language]):
            other = draw.choice([name for name in news if name != language])
            place = draw.randrange(SENTENCES)
            mixed = [*part]
            mixed[place] = draw.choice(news[other])
            texts.append(Text(join(mixed), language))
    return texts


def cut(sentences: Sequence[str]) -> list[Sequence[str]]:
    """The first texts of six sentences."""
    return [sentences[n * SENTENCES : (n + 1) * SENTENCES] for n in range(TEXTS)]


def join(sentences: Sequence[str]) -> str:
    """Sentences as lines of one text."""
    return "\n".join(sentences)


def measure(detector: Detector, texts: Mapping[str, Sequence[Text]], mixed: Sequence[Text]) -> dict[str, float]:
    """The share of wrong answers on each kind of text, of mixed texts that pass, and the time of a text of news."""
    figures = {name: share_wrong(detector, part) for name, part in texts.items()}
    figures["mixed, missed"] = 1 - share_wrong(detector, mixed)
    start = time.perf_counter()
    share_wrong(detector, texts["news"])
    figures["milliseconds for a text of news"] = 1000 * (time.perf_counter() - start) / len(texts["news"])
    return {name: round(value, 4) for name, value in figures.items()}


def share_wrong(detector: Detector, texts: Sequence[Text]) -> float:
    """The share of texts whose language the detector does not name."""
    return sum(detector(text) != language for text, language in texts) / len(texts)


if __name__ == "__main__":
    main()
