from copy import deepcopy

import pytest
import torch
from tests.evaluate.ratios import bits_per_byte, mean_kl, perplexity

from potstill.evaluate.agreement import collect_teacher_outputs, compare_with_teacher
from potstill.evaluate.latency import LatencyConfig
from potstill.evaluate.measures import (
    compute_paired_differences,
    measure_quality,
    measure_rouge,
    measure_size,
    measure_speed,
)
from potstill.evaluate.perplexity import build_text_rows, score
from potstill.evaluate.rouge import GenerationOptions, Question, score_answers
from potstill.evaluate.scoring_windows import ScoringConfig
from potstill.models.load import LoadedModel
from potstill.models.tokenizers.vocabulary import count_token_ids

TEXTS = ["The quick brown fox.", "jumps over", "the lazy dog, again and again."]
QUICK = LatencyConfig(prompt_tokens=4, new_tokens=2, runs=2, warm_up=0)


@pytest.fixture
def loaded(tiny_llama, tiny_tokenizer, tmp_path):
    return LoadedModel(tiny_llama, tiny_tokenizer, "tiny", tmp_path, None, "", "rounded")


@pytest.fixture
def student(tiny_llama):
    student = deepcopy(tiny_llama)
    with torch.no_grad():
        student.model.embed_tokens.weight.add_(0.1 * torch.randn_like(student.model.embed_tokens.weight))
    return student


def test_all_names_units_and_directions_are_those_of_the_table(loaded):
    rows = build_text_rows(TEXTS, loaded.tokenizer)
    asked = [Question(rows[0].input_ids, ["yes"]), Question(rows[1].input_ids, ["no"])]
    answers = score_answers(loaded.model, loaded.tokenizer, asked, options=GenerationOptions(max_new_tokens=2))
    found = measure_quality(compare_with_teacher(collect_teacher_outputs(loaded.model, rows), loaded.model))
    found += [measure_rouge(answers), *measure_size(loaded), *measure_speed(loaded, QUICK)]
    assert [(one.name, one.unit, one.better, one.n) for one in found] == [
        ("bits_per_byte", "bits/byte", "lower", 3),
        ("perplexity", "1", "lower", 3),
        ("teacher_kl", "nats/token", "lower", 3),
        ("teacher_agreement", "share", "higher", 3),
        ("acceptance", "share", "higher", 3),
        ("rouge_l", "F1 x 100", "higher", 2),
        ("parameters", "parameters", "lower", 1),
        ("bytes", "B", "lower", 1),
        ("bfloat16_bytes", "B", "lower", 1),
        ("prefill_tokens_per_second", "tokens/s", "higher", 2),
        ("decode_tokens_per_second", "tokens/s", "higher", 2),
        ("peak_memory", "B", "lower", 1),
    ]
    values = {one.name: one.value for one in found}
    assert values["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert values["teacher_agreement"] == 1
    for one in found:
        assert (one.low is None) == (one.name in {"parameters", "bytes", "bfloat16_bytes", "peak_memory"})
        assert one.low is None or one.low <= one.value <= one.high


def test_without_a_teacher_only_the_text_is_measured(loaded):
    found = measure_quality(score(loaded.model, build_text_rows(TEXTS, loaded.tokenizer)))
    assert [one.name for one in found] == ["bits_per_byte", "perplexity"]


def test_a_single_document_has_no_interval(loaded):
    bits, ppl = measure_quality(score(loaded.model, build_text_rows(TEXTS[:1], loaded.tokenizer)))
    assert bits.low is bits.high is ppl.low is None


def test_values_are_those_of_the_scores(loaded):
    scores = score(loaded.model, build_text_rows(TEXTS, loaded.tokenizer))
    bits, ppl = measure_quality(scores)
    assert (bits.value, ppl.value) == pytest.approx((bits_per_byte(scores), perplexity(scores)))
    assert bits.note == "57 tokens, 57 bytes; interval over documents"


def test_bytes_lie_on_disk_where_they_do_and_else_in_memory(loaded):
    size = measure_size(loaded)[1]
    assert (size.value, size.note) == (4 * sum(p.numel() for p in loaded.model.parameters()), "rounded, in memory")
    loaded.model.save_pretrained(loaded.path)
    size = measure_size(loaded)[1]
    assert size.value == (loaded.path / "model.safetensors").stat().st_size
    assert "on disk" in size.note
    loaded.model.to(torch.bfloat16).save_pretrained(loaded.path)
    halved, compared = measure_size(loaded)[1:]
    assert halved.value == pytest.approx(size.value / 2, rel=0.05)
    assert compared.value == 2 * sum(p.numel() for p in loaded.model.parameters())


def test_padding_rows_of_the_head_do_not_enter(loaded):
    rows, real = build_text_rows(TEXTS, loaded.tokenizer), ScoringConfig(vocabulary=count_token_ids(loaded.tokenizer))
    expected = bits_per_byte(score(loaded.model, rows, real))
    loaded.model.resize_token_embeddings(320, mean_resizing=False)
    assert count_token_ids(loaded.tokenizer) == 259
    assert bits_per_byte(score(loaded.model, rows, real)) == pytest.approx(expected, rel=1e-5)
    assert bits_per_byte(score(loaded.model, rows)) > expected * 1.001


def test_differences_are_paired_for_every_two_models(loaded, student):
    rows = build_text_rows(TEXTS, loaded.tokenizer)
    teacher = collect_teacher_outputs(loaded.model, rows)
    seen = {"student": compare_with_teacher(teacher, student), "teacher": compare_with_teacher(teacher, loaded.model)}
    found = {one["name"]: one for one in compute_paired_differences(seen)}
    assert set(found) == {"bits_per_byte", "teacher_kl", "teacher_agreement"}
    assert all((one["a"], one["b"]) == ("student", "teacher") for one in found.values())
    assert found["teacher_kl"]["value"] == pytest.approx(mean_kl(seen["student"]), abs=1e-6)
    assert found["teacher_kl"]["low"] > 0
    assert found["teacher_kl"]["probability"] == 0
    gap = bits_per_byte(seen["student"].scores) - bits_per_byte(seen["teacher"].scores)
    assert found["bits_per_byte"]["value"] == pytest.approx(gap)


def test_models_that_scored_other_text_are_not_paired(loaded, student):
    one, other = (score(loaded.model, build_text_rows(texts, loaded.tokenizer)) for texts in (TEXTS, TEXTS[:2]))
    assert compute_paired_differences({"a": one, "b": other}) == []
