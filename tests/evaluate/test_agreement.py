from copy import deepcopy

import pytest
import torch
from tests.evaluate.ratios import agreement, mean_kl
from transformers import LlamaForCausalLM

from potstill.core.errors import UsageError, VocabularyMismatch
from potstill.evaluate.agreement import collect_teacher_outputs, compare_with_teacher
from potstill.evaluate.perplexity import build_text_rows, score
from potstill.evaluate.scoring_windows import ScoringConfig

TEXTS = ["The quick brown fox.", "", "jumps over", "the lazy dog, again and again, until evening falls on the yard."]


def student_of(model: LlamaForCausalLM, *, noise: float = 0.05) -> LlamaForCausalLM:
    student = deepcopy(model)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return student


@pytest.fixture
def rows(tiny_tokenizer):
    return build_text_rows(TEXTS, tiny_tokenizer)


def test_a_student_that_is_its_teacher_agrees_fully(tiny_llama, rows):
    found = compare_with_teacher(collect_teacher_outputs(tiny_llama, rows), deepcopy(tiny_llama))
    assert mean_kl(found) == pytest.approx(0, abs=1e-6)
    assert agreement(found) == 1
    assert found.top1_matches.tolist() == found.scores.num_tokens.tolist()
    assert found.acceptance == pytest.approx(found.scores.num_tokens, rel=1e-6)


def test_kl_agreement_and_acceptance_are_their_definitions_document_by_document(tiny_llama, rows):
    student = student_of(tiny_llama)
    found = compare_with_teacher(collect_teacher_outputs(tiny_llama, rows), student)
    for number, row in enumerate(rows):
        if not row.input_ids:
            assert found.kl[number] == found.top1_matches[number] == 0
            continue
        with torch.no_grad():
            p, q = (m(torch.tensor([row.input_ids])).logits[0, :-1].log_softmax(-1) for m in (tiny_llama, student))
        assert found.kl[number] == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-4)
        assert found.acceptance[number] == pytest.approx(torch.minimum(p.exp(), q.exp()).sum().item(), rel=1e-4)
        assert found.top1_matches[number] == (p.argmax(-1) == q.argmax(-1)).sum()
    assert 0 < agreement(found) < 1


def test_the_scores_of_both_come_with_the_comparison(tiny_llama, rows):
    student = student_of(tiny_llama)
    teacher = collect_teacher_outputs(tiny_llama, rows)
    assert teacher.scores.nll == pytest.approx(score(tiny_llama, rows).nll, rel=1e-5)
    assert compare_with_teacher(teacher, student).scores.nll == pytest.approx(score(student, rows).nll, rel=1e-5)


@pytest.mark.parametrize(
    "reading", [ScoringConfig(batch_tokens=1), ScoringConfig(chunk=1), ScoringConfig(batch_tokens=40, chunk=7)]
)
def test_batches_and_chunks_change_nothing(tiny_llama, rows, reading):
    student = student_of(tiny_llama)
    plain, other = (
        compare_with_teacher(collect_teacher_outputs(tiny_llama, rows, r), student) for r in (ScoringConfig(), reading)
    )
    assert other.kl == pytest.approx(plain.kl, rel=1e-4)
    assert other.top1_matches.tolist() == plain.top1_matches.tolist()


def test_a_teacher_that_does_not_fit_in_memory_is_read_again(tiny_llama, rows):
    student = student_of(tiny_llama)
    kept, again = collect_teacher_outputs(tiny_llama, rows), collect_teacher_outputs(tiny_llama, rows, max_bytes=0)
    assert kept.model is None
    assert again.cached_signals is None
    assert compare_with_teacher(again, student).kl == pytest.approx(compare_with_teacher(kept, student).kl, rel=1e-6)
    assert again.scores.nll.tolist() == kept.scores.nll.tolist()


def test_vocabularies_padded_to_other_widths_compare_on_the_real_ids(tiny_llama, rows, tiny_tokenizer):
    student = student_of(tiny_llama)
    plain = compare_with_teacher(collect_teacher_outputs(tiny_llama, rows), student)
    padded = deepcopy(tiny_llama)
    padded.resize_token_embeddings(320, mean_resizing=False)
    reading = ScoringConfig(vocabulary=len(tiny_tokenizer))
    assert compare_with_teacher(collect_teacher_outputs(padded, rows, reading), student).kl == pytest.approx(
        plain.kl, rel=1e-5
    )
    wide = collect_teacher_outputs(padded, rows)
    assert compare_with_teacher(wide, student, vocabulary=len(tiny_tokenizer)).kl == pytest.approx(plain.kl, rel=1e-5)


def test_other_numbers_of_tokens_are_refused(tiny_llama, rows):
    padded = deepcopy(tiny_llama)
    padded.resize_token_embeddings(320, mean_resizing=False)
    with pytest.raises(VocabularyMismatch, match="320 tokens and the student 259"):
        compare_with_teacher(collect_teacher_outputs(padded, rows), tiny_llama)


def test_a_student_of_a_shorter_context_is_refused(tiny_llama, rows):
    short = deepcopy(tiny_llama)
    short.config.max_position_embeddings = 16
    with pytest.raises(UsageError, match="reads at most 16"):
        compare_with_teacher(collect_teacher_outputs(tiny_llama, rows), short)
    reading = ScoringConfig().limit_to_context(tiny_llama, short)
    assert mean_kl(compare_with_teacher(collect_teacher_outputs(tiny_llama, rows, reading), short)) == pytest.approx(
        0, abs=1e-6
    )


def test_a_teacher_that_trains_is_read_at_rest_and_left_training(tiny_llama, rows):
    tiny_llama.train()
    collect_teacher_outputs(tiny_llama, rows)
    assert tiny_llama.training
