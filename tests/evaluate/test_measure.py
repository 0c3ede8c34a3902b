from copy import deepcopy

import pytest
import torch

from potstill.evaluate.agreement import compare, remember
from potstill.evaluate.latency import Trial
from potstill.evaluate.measure import differences, quality, rouge, sizes, speeds
from potstill.evaluate.perplexity import score, text_rows
from potstill.evaluate.reading import Reading
from potstill.evaluate.rouge import Question, Writing, judge_answers
from potstill.models.load import Loaded
from potstill.models.vocabulary import real_ids

TEXTS = ["The quick brown fox.", "jumps over", "the lazy dog, again and again."]
QUICK = Trial(prompt_tokens=4, new_tokens=2, runs=2, warm_up=0)


@pytest.fixture
def loaded(tiny_llama, tiny_tokenizer, tmp_path):
    return Loaded(tiny_llama, tiny_tokenizer, "tiny", tmp_path, None, "", "rounded")


@pytest.fixture
def student(tiny_llama):
    student = deepcopy(tiny_llama)
    with torch.no_grad():
        student.model.embed_tokens.weight.add_(0.1 * torch.randn_like(student.model.embed_tokens.weight))
    return student


def test_all_names_units_and_directions_are_those_of_the_table(loaded):
    rows = text_rows(TEXTS, loaded.tokenizer)
    asked = [Question(rows[0].input_ids, ["yes"]), Question(rows[1].input_ids, ["no"])]
    answers = judge_answers(loaded.model, loaded.tokenizer, asked, writing=Writing(max_new_tokens=2))
    found = quality(compare(remember(loaded.model, rows), loaded.model))
    found += [rouge(answers), *sizes(loaded), *speeds(loaded, QUICK)]
    assert [(one.name, one.unit, one.better, one.n) for one in found] == [
        ("bits_per_byte", "bits/byte", "lower", 3),
        ("perplexity", "1", "lower", 3),
        ("teacher_kl", "nats/token", "lower", 3),
        ("teacher_agreement", "share", "higher", 3),
        ("rouge_l", "F1 x 100", "higher", 2),
        ("parameters", "parameters", "lower", 1),
        ("bytes", "B", "lower", 1),
        ("prefill_tokens_per_second", "tokens/s", "higher", 2),
        ("decode_tokens_per_second", "tokens/s", "higher", 2),
        ("peak_memory", "B", "lower", 1),
    ]
    values = {one.name: one.value for one in found}
    assert values["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert values["teacher_agreement"] == 1
    for one in found:
        assert (one.low is None) == (one.name in {"parameters", "bytes", "peak_memory"})
        assert one.low is None or one.low <= one.value <= one.high


def test_without_a_teacher_only_the_text_is_measured(loaded):
    found = quality(score(loaded.model, text_rows(TEXTS, loaded.tokenizer)))
    assert [one.name for one in found] == ["bits_per_byte", "perplexity"]


def test_a_single_document_has_no_interval(loaded):
    bits, perplexity = quality(score(loaded.model, text_rows(TEXTS[:1], loaded.tokenizer)))
    assert bits.low is bits.high is perplexity.low is None


def test_values_are_those_of_the_scores(loaded):
    scores = score(loaded.model, text_rows(TEXTS, loaded.tokenizer))
    bits, perplexity = quality(scores)
    assert (bits.value, perplexity.value) == pytest.approx((scores.bits_per_byte, scores.perplexity))
    assert bits.note == "57 tokens, 57 bytes; interval over documents"


def test_bytes_lie_on_disk_where_they_do_and_else_in_memory(loaded):
    size = sizes(loaded)[1]
    assert (size.value, size.note) == (4 * sum(p.numel() for p in loaded.model.parameters()), "rounded, in memory")
    loaded.model.save_pretrained(loaded.path)
    size = sizes(loaded)[1]
    assert size.value == (loaded.path / "model.safetensors").stat().st_size
    assert "on disk" in size.note


def test_padding_rows_of_the_head_do_not_enter(loaded):
    rows, real = text_rows(TEXTS, loaded.tokenizer), Reading(vocabulary=real_ids(loaded.tokenizer))
    expected = score(loaded.model, rows, real).bits_per_byte
    loaded.model.resize_token_embeddings(320, mean_resizing=False)
    assert real_ids(loaded.tokenizer) == 259
    assert score(loaded.model, rows, real).bits_per_byte == pytest.approx(expected, rel=1e-5)
    assert score(loaded.model, rows).bits_per_byte > expected * 1.001


def test_differences_are_paired_for_every_two_models(loaded, student):
    rows = text_rows(TEXTS, loaded.tokenizer)
    teacher = remember(loaded.model, rows)
    seen = {"student": compare(teacher, student), "teacher": compare(teacher, loaded.model)}
    found = {one["name"]: one for one in differences(seen)}
    assert set(found) == {"bits_per_byte", "teacher_kl", "teacher_agreement"}
    assert all((one["a"], one["b"]) == ("student", "teacher") for one in found.values())
    assert found["teacher_kl"]["value"] == pytest.approx(seen["student"].divergence, abs=1e-6)
    assert found["teacher_kl"]["low"] > 0
    assert found["teacher_kl"]["probability"] == 0
    gap = seen["student"].scores.bits_per_byte - seen["teacher"].scores.bits_per_byte
    assert found["bits_per_byte"]["value"] == pytest.approx(gap)


def test_models_that_scored_other_text_are_not_paired(loaded, student):
    one, other = (score(loaded.model, text_rows(texts, loaded.tokenizer)) for texts in (TEXTS, TEXTS[:2]))
    assert differences({"a": one, "b": other}) == []
