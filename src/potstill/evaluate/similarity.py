"""The similarity of a prompt to others: ROUGE-L F1 over words, with each Chinese or Japanese character as a word.

    F1 = 2 LCS(a, b) / (|a| + |b|)

Source: Lin, 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"; as the filter of new instructions in
Self-Instruct (arXiv:2212.10560), section 2.2. The package `rouge_score` computes the longest common subsequence.
"""

import re
from collections import Counter
from collections.abc import Iterable

IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\W{IDEOGRAPHS}]+")


class Words:
    """Cuts a text into words, in the interface of `rouge_score`."""

    def tokenize(self, text: str) -> list[str]:
        """The words in lower case, without punctuation."""
        return WORD.findall(text.casefold())


class PromptPool:
    """Prompts, of which a new one may be a repetition."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._counts: list[tuple[str, Counter[str]]] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Adds a prompt."""
        self._counts.append((text, Counter(Words().tokenize(text))))

    def find_similarity(self, text: str, *, minimum: float = 0.5) -> float:
        """The largest ROUGE-L F1 of `text` with a prompt of the pool; 0 where it is below `minimum`.

        A common subsequence is no longer than the words in common, which spares most of the exact comparisons.
        """
        from rouge_score.rouge_scorer import RougeScorer  # a slow import

        scorer = RougeScorer(["rougeL"], tokenizer=Words())
        counts, best = Counter(Words().tokenize(text)), 0.0
        for prompt, prompt_counts in self._counts:
            total = counts.total() + prompt_counts.total()
            bound = 2 * (counts & prompt_counts).total() / total if total else float(text == prompt)
            if bound >= max(best, minimum):
                best = max(best, scorer.score(prompt, text)["rougeL"].fmeasure if total else bound)
        return best if best >= minimum else 0.0
