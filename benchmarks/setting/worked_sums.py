"""Worked answers to sums with the languages mixed up on purpose, for a cold start before rewards."""

import random
from collections.abc import Iterable, Mapping
from typing import Any

from setting.sums import QUESTIONS

THINKING = {
    "en": "I add the two numbers: {a} plus {b} makes {c}.",
    "fr": "J'ajoute les deux nombres : {a} plus {b} donne {c}.",
    "es": "Sumo los dos números: {a} más {b} da {c}.",
    "de": "Ich addiere die beiden Zahlen: {a} plus {b} ergibt {c}.",
}
ANSWERS = {
    "en": "So the result is {c}.",
    "fr": "Le résultat est donc {c}.",
    "es": "Entonces el resultado es {c}.",
    "de": "Das Ergebnis ist also {c}.",
}
SAME_LANGUAGE = 0.4  # the share of answers that think in the language of the question
ENGLISH = 0.6  # the share of the others that think in English
RIGHT = {"en": 0.9, "fr": 0.4, "es": 0.4, "de": 0.4}  # by the language of the thinking


def make_worked_sums(rows: Iterable[Mapping[str, Any]], *, seed: int = 0) -> list[dict[str, str]]:
    """A prompt and a response for each row; English thinking is right more often, which makes English easier."""
    generator = random.Random(seed)
    return [{"prompt": row["prompt"], "response": write_answer(row, generator)} for row in rows]


def write_answer(row: Mapping[str, Any], generator: random.Random) -> str:
    """Thinking and answer in one language, which is often not that of the question, with a right or a wrong sum."""
    a, b = map(int, row["id"].split("+"))
    asked = row["language"]
    others = [language for language in QUESTIONS if language != asked]
    language = asked if generator.random() < SAME_LANGUAGE else generator.choice(others)
    if language != asked and asked != "en" and generator.random() < ENGLISH:
        language = "en"
    wrong = [c for c in range(a + b - 3, a + b + 4) if c >= 0 and c != a + b]
    c = a + b if generator.random() < RIGHT[language] else generator.choice(wrong)
    return f"{THINKING[language].format(a=a, b=b, c=c)}\n</think>\n{ANSWERS[language].format(c=c)}"
