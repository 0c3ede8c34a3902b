"""A student and its teacher after training: each has the bits per byte of its own chat template."""

from copy import deepcopy
from pathlib import Path

import pytest
from tests.stages.world import THINKING
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.measure import Measure
from potstill.data.corpus import load_corpus
from potstill.evaluate.measures import measure_quality
from potstill.evaluate.perplexity import score
from potstill.evaluate.scoring_windows import ScoringConfig
from potstill.models.load import LoadedModel
from potstill.stages.dataset import build_rows
from potstill.stages.distill.evaluation import evaluate_student_and_teacher


def get_measure(measures: list[Measure], name: str) -> Measure:
    return next(measure for measure in measures if measure.name == name)


def test_a_teacher_of_another_template_has_the_bits_of_its_own(
    pairs: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    thinking = deepcopy(tiny_tokenizer)
    thinking.chat_template = THINKING
    student = LoadedModel(tiny_llama, tiny_tokenizer, "student", pairs.parent / "student", None, "")
    teacher = LoadedModel(tiny_llama, thinking, "teacher", pairs.parent / "teacher", None, "")
    corpus, reading = load_corpus(str(pairs), split="all"), ScoringConfig(vocabulary=259)
    rows, teacher_rows = (build_rows(corpus, model.tokenizer, documents=8) for model in (student, teacher))
    measures = evaluate_student_and_teacher(student, teacher, rows, reading, teacher_rows=teacher_rows)
    for name, own_rows in (("student", rows), ("teacher", teacher_rows)):
        (bits, _) = measure_quality(score(tiny_llama, own_rows, reading))
        assert get_measure(measures[name], "bits_per_byte").value == pytest.approx(bits.value, rel=1e-6)
        comparison = get_measure(measures[name], "teacher_kl")
        assert comparison.value == pytest.approx(0, abs=1e-6)
        assert "in the chat template of student" in comparison.note
    assert len({get_measure(found, "bits_per_byte").value for found in measures.values()}) == 2
