import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.evaluate.ratios import bits_per_byte, perplexity
from tokenizers import processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import DataError
from potstill.core.types import IGNORE
from potstill.evaluate.perplexity import (
    build_text_rows,
    compute_nll,
    count_first_token_bytes,
    get_bos_id,
    score,
)
from potstill.evaluate.scoring_windows import Row, ScoringConfig
from potstill.models.signals import get_head

TEXTS = ["The quick brown fox.", "Jumps over", "the lazy dog, again and again, until evening falls on the yard."]
EMOJI = "🙂 日本語 naïve"


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy of `tokenizer` that opens every text with its BOS, as Llama's does."""
    copy = deepcopy(tokenizer)
    bos = copy.bos_token
    copy.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, copy.bos_token_id)]
    )
    return copy


def unigram(model: LlamaForCausalLM, logits: torch.Tensor) -> LlamaForCausalLM:
    """A copy of `model` whose every prediction is softmax(logits): its hidden states are constant."""
    config = deepcopy(model.config)
    config.tie_word_embeddings = False
    constant = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in constant.model.parameters():
            parameter.zero_()
        # embedding 1, one feature; RMSNorm of a constant vector is that vector over its root mean square, that is 1
        constant.model.embed_tokens.weight.fill_(1.0)
        constant.model.norm.weight.fill_(1.0)
        constant.lm_head.weight.copy_(logits[:, None] / config.hidden_size)
    return constant


def alone(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """The nats that `model` pays for ids[1:], each after all that stand before it: the definition."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return -logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_a_unigram_model_pays_what_the_hand_computes(tiny_llama, tiny_tokenizer):
    # p(a) = 1/2, p(b) = 1/4, and 1/4 on "c": after the first letter, "aab" costs 1 + 2 bits for 2 bytes
    logits = torch.full((len(tiny_tokenizer),), -100.0)
    for letter, share in (("a", 0.5), ("b", 0.25), ("c", 0.25)):
        logits[tiny_tokenizer.convert_tokens_to_ids(letter)] = math.log(share)
    scores = score(unigram(tiny_llama, logits), build_text_rows(["aab", "ca"], tiny_tokenizer))
    assert scores.nll / math.log(2) == pytest.approx([3, 1], abs=1e-4)
    assert bits_per_byte(scores) == pytest.approx(4 / 3, abs=1e-4)
    assert perplexity(scores) == pytest.approx(2 ** (4 / 3), abs=1e-4)
    assert scores.num_tokens.tolist() == [2, 1]


def test_scores_are_those_of_each_document_alone(tiny_llama, tiny_tokenizer):
    scores = score(tiny_llama, build_text_rows(TEXTS, tiny_tokenizer))
    expected = [alone(tiny_llama, tiny_tokenizer(text).input_ids).sum().item() for text in TEXTS]
    assert scores.nll == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "reading", [ScoringConfig(batch_tokens=1), ScoringConfig(batch_tokens=50, chunk=3), ScoringConfig(chunk=1)]
)
def test_batches_and_chunks_change_nothing(tiny_llama, tiny_tokenizer, reading):
    rows = build_text_rows(TEXTS, tiny_tokenizer)
    assert score(tiny_llama, rows, reading).nll == pytest.approx(score(tiny_llama, rows).nll, rel=1e-5)


def test_a_model_that_is_padded_scores_as_one_that_is_packed(tiny_llama, tiny_tokenizer, monkeypatch):
    from potstill.models import packed_attention

    rows = build_text_rows(TEXTS, tiny_tokenizer)
    packed = score(tiny_llama, rows).nll
    monkeypatch.setattr(packed_attention, "install_packed_attention", lambda model, **_: False)
    assert score(deepcopy(tiny_llama), rows).nll == pytest.approx(packed, rel=1e-5)


def test_the_order_and_number_of_copies_of_documents_change_nothing(tiny_llama, tiny_tokenizer):
    rows = build_text_rows(TEXTS, tiny_tokenizer)
    once, twice = score(tiny_llama, rows), score(tiny_llama, [*reversed(rows), *rows])
    assert bits_per_byte(twice) == pytest.approx(bits_per_byte(once), rel=1e-6)
    assert perplexity(twice) == pytest.approx(perplexity(once), rel=1e-6)
    assert twice.nll == pytest.approx([*reversed(once.nll), *once.nll], rel=1e-5)


@pytest.mark.parametrize("stride", [1, 5, 40])
def test_a_document_within_the_window_does_not_see_window_or_stride(tiny_llama, tiny_tokenizer, stride):
    rows = build_text_rows([TEXTS[0]], tiny_tokenizer)
    short = score(tiny_llama, rows, ScoringConfig(context=len(rows[0].input_ids), stride=min(stride, 19)))
    assert short.nll == pytest.approx(score(tiny_llama, rows, ScoringConfig(context=200, stride=stride)).nll, rel=1e-5)


@settings(max_examples=20)
@given(st.integers(4, 24), st.integers(1, 23), st.booleans())
def test_a_long_document_is_scored_by_its_windows(context, stride, opened):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    stride = min(stride, context - 1 - opened)
    ids = torch.randint(3, 20, (30,)).tolist()
    row = Row([1, *ids], [IGNORE, *ids], 30, prefix_length=1) if opened else Row(ids, [IGNORE, *ids[1:]], 29)
    head, width = ([1], context - 1) if opened else ([], context)
    expected, stop, fresh = 0.0, width, 0 if opened else 1
    while fresh < len(ids):  # the definition: each window alone, and of it what was not scored before
        stop = min(stop, len(ids))
        paid = alone(model, [*head, *ids[max(0, stop - width) : stop]])
        expected += paid[len(paid) - (stop - fresh) :].sum().item()
        fresh, stop = stop, stop + stride
    found = score(model, [row], ScoringConfig(context=context, stride=stride))
    assert found.nll[0] == pytest.approx(expected, rel=1e-4)
    assert found.num_tokens[0] == 30 if opened else 29


def test_the_context_of_the_model_bounds_the_window(tiny_llama, tiny_tokenizer):
    rows = build_text_rows(["x" * 300], tiny_tokenizer)
    explicit = score(tiny_llama, rows, ScoringConfig(context=256))
    assert score(tiny_llama, rows, ScoringConfig(context=100_000)).nll == pytest.approx(explicit.nll)


def test_without_a_bos_the_first_token_and_its_bytes_do_not_count(tiny_tokenizer):
    (row,) = build_text_rows(["aé"], tiny_tokenizer)
    assert len(row.input_ids) == 3
    assert row.labels[0] == IGNORE
    assert (row.num_bytes, row.prefix_length) == (2, 0)


def test_with_a_bos_every_real_token_and_byte_counts(tiny_tokenizer, tiny_llama):
    (row,) = build_text_rows(["aé"], with_bos(tiny_tokenizer))
    assert row.input_ids[0] == tiny_tokenizer.bos_token_id
    assert row.labels == [IGNORE, *row.input_ids[1:]]
    assert (row.num_bytes, row.prefix_length) == (3, 1)
    paid = alone(tiny_llama, list(row.input_ids)).sum().item()
    assert score(tiny_llama, [row]).nll[0] == pytest.approx(paid, rel=1e-5)


def test_a_bos_is_never_doubled(tiny_tokenizer):
    tokenizer = with_bos(tiny_tokenizer)
    plain, opened = build_text_rows(["ab", tokenizer.bos_token + "ab"], tokenizer)
    assert plain == opened


def test_a_tokenizer_without_bos_keeps_one_that_stands_in_the_text_as_text(tiny_tokenizer):
    (row,) = build_text_rows([tiny_tokenizer.bos_token + "ab"], tiny_tokenizer)
    assert (row.num_bytes, row.prefix_length) == (2, 0)
    assert get_bos_id(tiny_tokenizer) is None
    assert get_bos_id(with_bos(tiny_tokenizer)) == tiny_tokenizer.bos_token_id


def test_the_bytes_of_emoji_and_cjk_are_those_of_utf8(tiny_tokenizer):
    (row,) = build_text_rows([EMOJI], with_bos(tiny_tokenizer))
    assert row.num_bytes == len(EMOJI.encode()) == 4 + 1 + 9 + 1 + 6
    (row,) = build_text_rows([EMOJI], tiny_tokenizer)  # byte tokens: the first is a quarter of the emoji
    assert row.num_bytes == 20
    assert len(row.input_ids) - 1 == 20


@pytest.mark.parametrize(
    ("text", "offsets", "size"),
    [
        ("ab cd", [(0, 2), (3, 5)], 2),
        (" ab", [(1, 3)], 3),  # trimmed offsets: the space belongs to the first token
        ("日本", [(0, 2)], 6),
        ("日本", [(0, 1), (0, 1), (0, 1), (1, 2)], 1),
        ("🙂b", [(0, 1), (0, 1), (1, 2)], 2),
        ("a🙂", [(0, 2), (1, 2)], 3),
    ],
)
def test_the_first_token_stands_for_its_bytes(text, offsets, size):
    assert count_first_token_bytes(text, offsets) == size


def test_a_text_that_begins_with_spaces_counts_its_bytes_under_trimmed_offsets(tiny_llama, tiny_tokenizer):
    for add_prefix_space in (False, True):  # these leave a first token of a space at (1, 1) and at (0, 0)
        trimming = processors.ByteLevel(add_prefix_space=add_prefix_space, trim_offsets=True)
        tiny_tokenizer.backend_tokenizer.post_processor = trimming
        (row,) = build_text_rows(["  ab"], tiny_tokenizer)
        assert (len(row.input_ids), row.num_bytes) == (4, 3)
        assert math.isfinite(bits_per_byte(score(tiny_llama, [row])))


def test_empty_and_single_token_documents_cost_nothing(tiny_llama, tiny_tokenizer):
    rows = build_text_rows(["", "a", TEXTS[0]], tiny_tokenizer)
    scores = score(tiny_llama, rows)
    assert scores.num_tokens.tolist()[:2] == scores.num_bytes.tolist()[:2] == scores.nll.tolist()[:2] == [0, 0]
    assert bits_per_byte(scores) == pytest.approx(bits_per_byte(score(tiny_llama, rows[2:])))


@pytest.mark.parametrize("texts", [[], [""], ["a", ""]])
def test_nothing_to_score_is_refused(tiny_llama, tiny_tokenizer, texts):
    with pytest.raises(DataError, match="no token to score"):
        score(tiny_llama, build_text_rows(texts, tiny_tokenizer))


def test_the_model_leaves_as_it_came_even_after_an_error(tiny_llama, tiny_tokenizer):
    tiny_llama.train()
    tiny_llama.model.layers[1].eval()
    before = [module.training for module in tiny_llama.modules()]
    rows = build_text_rows(TEXTS, tiny_tokenizer)
    score(tiny_llama, rows)
    with pytest.raises(IndexError):
        score(tiny_llama, [Row([0, 999], [IGNORE, 999], 1)])
    assert [module.training for module in tiny_llama.modules()] == before
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())


def test_dropout_is_off_while_scoring(tiny_llama, tiny_tokenizer):
    rows = build_text_rows(TEXTS, tiny_tokenizer)
    quiet = score(tiny_llama, rows).nll
    tiny_llama.config.attention_dropout = 0.9
    for module in tiny_llama.modules():
        if isinstance(module, nn.Module) and "attention_dropout" in vars(module):
            module.attention_dropout = 0.9
    assert score(tiny_llama.train(), rows).nll == pytest.approx(quiet, rel=1e-6)


def test_bf16_rounds_and_no_more(tiny_llama, tiny_tokenizer):
    rows = build_text_rows(TEXTS, tiny_tokenizer)
    exact, rounded = score(tiny_llama, rows), score(tiny_llama, rows, ScoringConfig(dtype=torch.bfloat16))
    assert not np.array_equal(exact.nll, rounded.nll)
    assert bits_per_byte(rounded) == pytest.approx(bits_per_byte(exact), rel=0.02)


def test_rows_that_pad_the_vocabulary_do_not_matter(tiny_llama, tiny_tokenizer):
    padded = deepcopy(tiny_llama)
    padded.resize_token_embeddings(320, mean_resizing=False)
    rows, reading = build_text_rows(TEXTS, tiny_tokenizer), ScoringConfig(vocabulary=len(tiny_tokenizer))
    assert score(padded, rows, reading).nll == pytest.approx(score(tiny_llama, rows).nll, rel=1e-5)
    assert bits_per_byte(score(padded, rows)) > bits_per_byte(score(tiny_llama, rows))


def test_logits_never_exist_for_more_rows_than_a_chunk(tiny_llama):
    from potstill.core.types import Signals

    head, seen = get_head(tiny_llama), []

    def logits(rows):
        seen.append(len(rows))
        return head.logits(rows)

    said = Signals(torch.randn(10, 32), logits)
    with torch.no_grad():
        compute_nll(said, torch.arange(10), chunk=4)
    assert seen == [4, 4, 2]
