import sys

import pytest

from potstill.core.errors import MissingDependency
from potstill.evaluate.lm_eval_harness import parse_results, run_tasks

RESULTS = {
    "results": {
        "arc_easy": {
            "alias": "arc_easy",
            "acc,none": 0.5,
            "acc_stderr,none": 0.01,
            "acc_norm,none": 0.4,
            "acc_norm_stderr,none": "N/A",
        },
        "wikitext": {"word_perplexity,none": 20.0, "word_perplexity_stderr,none": "N/A"},
        "gsm8k": {"exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": 0.02},
    },
    "higher_is_better": {"arc_easy": {"acc": True, "acc_norm": True}, "wikitext": {"word_perplexity": False}},
    "n-samples": {"arc_easy": {"original": 2376, "effective": 100}},
    "n-shot": {"arc_easy": 5},
    "versions": {"arc_easy": 1.0},
}


def test_results_become_measures_with_their_direction_version_and_interval():
    found = {measure.name: measure for measure in parse_results(RESULTS)}
    assert list(found) == [
        "arc_easy/acc",
        "arc_easy/acc_norm",
        "gsm8k/exact_match/strict-match",
        "wikitext/word_perplexity",
    ]
    accuracy = found["arc_easy/acc"]
    assert (accuracy.value, accuracy.n, accuracy.better) == (0.5, 100, "higher")
    assert (accuracy.low, accuracy.high) == pytest.approx((0.4804, 0.5196))
    assert accuracy.note == "lm-eval task version 1.0, 5-shot"
    assert found["arc_easy/acc_norm"].low is None
    assert found["wikitext/word_perplexity"].better == "lower"


def test_without_the_extra_the_command_is_named(tiny_llama, tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependency, match=r"pip install 'potstill\[eval\]'"):
        run_tasks(tiny_llama, tiny_tokenizer, ["arc_easy"])
