"""Encoders, encoder-decoders, classifiers and task models give the signals that their own forward gives."""

from typing import Any

import pytest
import torch
from tests.models.networks import BERT, LENGTHS, ROBERTA, SIZES, T5, build, documents, masked, packed
from tests.models.small import SMALL
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaForCausalLM,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5ForConditionalGeneration,
)

from potstill.core.errors import UnsupportedModel
from potstill.core.types import IGNORE, Batch, Head, Needs, Signals, supervised_positions
from potstill.models.causality import is_causal, require_causal
from potstill.models.probing import sees_no_later_token
from potstill.models.signals import RELATIONS, compute_signals, get_constant_head, probe_model

DISTILBERT = DistilBertConfig(
    vocab_size=97, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64, initializer_range=0.3
)
MASKED = {
    "bert": (BertForMaskedLM, BERT, {}),
    "roberta": (RobertaForMaskedLM, ROBERTA, {}),
    "distilbert": (DistilBertForMaskedLM, DISTILBERT, {}),
}
DECODERS = {
    "bert": (BertLMHeadModel, BERT, {"is_decoder": True}),
    "roberta": (RobertaForCausalLM, ROBERTA, {"is_decoder": True}),
}


def logits_alone(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The model's own logits of each document, end to end [1 T V]."""
    parts = batch["input_ids"].split(batch["documents"][0].bincount().tolist(), 1)
    with torch.no_grad():
        return torch.cat([model(input_ids=ids).logits for ids in parts], 1)


@pytest.mark.parametrize("name", MASKED)
def test_an_encoder_gives_its_own_logits_at_its_targets(name: str) -> None:
    model, batch = build(*MASKED[name][:2]), masked(documents())
    positions, targets, _ = supervised_positions(batch)
    with torch.no_grad():
        signals = compute_signals(model, batch, Needs(positions, layers=frozenset({1, 2})))
    assert signals.head is not None  # the transform before it is a part of the rows
    assert len(signals.rows) == len(targets)
    expected = logits_alone(model, batch)[positions]
    torch.testing.assert_close(signals.logits(signals.rows), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(get_constant_head(model).logits(signals.rows), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(signals.layers[2], signals.rows)
    assert not is_causal(model)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_with_a_transform_gives_its_own_logits(name: str) -> None:
    cls, config, changes = DECODERS[name]
    model, batch = build(cls, config, **changes), packed(documents())
    positions, *_ = supervised_positions(batch)
    with torch.no_grad():
        signals = compute_signals(model, batch, Needs(positions))
    assert is_causal(model)
    expected = logits_alone(model, batch)[positions]
    torch.testing.assert_close(signals.logits(signals.rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["roberta"])
@pytest.mark.parametrize("is_decoder", [False, True])
def test_positions_begin_where_the_model_itself_begins(name: str, is_decoder: bool) -> None:
    cls, config, changes = DECODERS[name] if is_decoder else MASKED[name]
    model = build(cls, config, **changes)
    assert probe_model(model).position_offset == 2
    (alone,) = documents((9,))
    batch = packed([alone])
    everywhere = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    with torch.no_grad():
        signals = compute_signals(model, batch, Needs(everywhere))
        torch.testing.assert_close(signals.logits(signals.rows), model(input_ids=alone[None]).logits[0])


def test_relations_and_layers_need_no_head() -> None:
    model, batch = build(BertModel, BERT), masked(documents())
    positions, *_ = supervised_positions(batch)
    signals = compute_signals(model, batch, Needs(positions, frozenset({1}), frozenset(RELATIONS)))
    assert signals.head is None
    assert {name: values.shape for name, values in signals.relations.items()} == dict.fromkeys(
        RELATIONS, signals.rows.shape
    )
    hidden = model(input_ids=batch["input_ids"][:, : LENGTHS[0]], output_hidden_states=True).hidden_states
    first = int(positions[:, : LENGTHS[0]].sum())
    mask = positions[:, : LENGTHS[0]]
    torch.testing.assert_close(signals.layers[1][:first], hidden[1][mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(signals.rows[:first], hidden[2][mask], rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedModel, match="no output layer"):
        signals.logits(signals.rows)


class Doubled(LlamaForCausalLM):
    """A head that no config explains."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_layers_of_a_model_whose_head_is_unknown_are_its_hidden_states() -> None:
    model, batch = build(Doubled, LlamaConfig(**SMALL)), packed(documents())
    positions, *_ = supervised_positions(batch)
    signals = compute_signals(model, batch, Needs(positions, frozenset({1}), frozenset({"keys"})))
    assert signals.head is None
    parts = batch["input_ids"].split(LENGTHS, 1)
    expected = torch.cat([model(input_ids=ids, output_hidden_states=True).hidden_states[1] for ids in parts], 1)
    torch.testing.assert_close(signals.layers[1], expected[positions], rtol=1e-4, atol=1e-4)
    assert signals.relations["keys"].shape == (len(signals.rows), 16)


def test_tags_are_targets_of_a_token_classifier() -> None:
    model, batch = build(BertForTokenClassification, BERT, num_labels=5), packed(documents())
    batch["targets"] = torch.where(batch["position_ids"] > 0, batch["input_ids"] % 5, IGNORE)
    positions, *_ = supervised_positions(batch)
    with torch.no_grad():
        signals = compute_signals(model, batch, Needs(positions))
    expected = logits_alone(model, batch)[positions]
    assert signals.head is not None
    torch.testing.assert_close(signals.head.logits(signals.rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (BertForSequenceClassification, BERT),
        (RobertaForSequenceClassification, ROBERTA),
        (LlamaForSequenceClassification, LlamaConfig(**SMALL)),
    ],
)
def test_a_class_is_the_target_of_one_position_of_each_document(cls: type[PreTrainedModel], config: Any) -> None:
    model, batch = build(cls, config, num_labels=4), packed(documents())
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    targets = torch.full_like(batch["input_ids"], IGNORE)
    targets[0, ends] = torch.tensor([3, 0, 1])
    batch["targets"] = targets
    positions, *_ = supervised_positions(batch)
    with torch.no_grad():
        signals = compute_signals(model, batch, Needs(positions))
        expected = torch.cat([model(input_ids=ids).logits for ids in batch["input_ids"].split(LENGTHS, 1)])
    assert signals.head is not None
    torch.testing.assert_close(signals.head.logits(signals.rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_an_encoder_decoder_encodes_the_source_of_each_document(tied: bool) -> None:
    model = build(T5ForConditionalGeneration, T5, tie_word_embeddings=tied)
    sources, batch = documents((5, 9, 3)), packed(documents())
    batch |= {f"source.{name}": values for name, values in packed(sources).items() if name != "labels"}
    positions, *_ = supervised_positions(batch)
    with torch.no_grad():
        signals = compute_signals(model, batch, Needs(positions, layers=frozenset({1})))
        pairs = zip(sources, batch["input_ids"].split(LENGTHS, 1), strict=True)
        outputs = [model(input_ids=source[None], decoder_input_ids=ids).logits for source, ids in pairs]
    assert signals.head is not None
    torch.testing.assert_close(signals.logits(signals.rows), torch.cat(outputs, 1)[positions], rtol=1e-4, atol=1e-4)
    assert signals.layers[1].shape == signals.rows.shape
    assert is_causal(model)  # its decoder is
    with pytest.raises(UnsupportedModel, match=r"source\.input_ids"):
        compute_signals(model, packed(documents()), Needs(positions))


class Tagger(nn.Module):
    """A task model: an embedding, a recurrence over the tokens in either direction, and a linear layer."""

    def __init__(self, *, is_bidirectional: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Embedding(97, 16), nn.Linear(16 * (1 + is_bidirectional), 5)
        self.mix = nn.GRU(16, 16, batch_first=True, bidirectional=is_bidirectional)

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        head = Head(self.head.weight, self.head.bias)
        rows = self.mix(self.embed(batch["input_ids"]))[0][needs.positions]
        return Signals(rows, head.logits, head)


def test_a_task_model_answers_itself_and_its_causality_is_probed() -> None:
    batch = packed(documents((9,)))
    needs = Needs(torch.ones_like(batch["input_ids"], dtype=torch.bool))
    assert compute_signals(Tagger(is_bidirectional=True), batch, needs).rows.shape == (9, 32)
    assert not is_causal(Tagger(is_bidirectional=True))
    assert is_causal(Tagger(is_bidirectional=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_see_later_tokens_are_refused_with_what_to_do(dtype: torch.dtype) -> None:
    encoder = build(BertLMHeadModel, BERT).to(dtype)  # is_decoder=False: as transformers loads a BERT for causal text
    decoder = build(BertLMHeadModel, BERT, is_decoder=True).to(dtype)
    assert not sees_no_later_token(encoder)
    with pytest.raises(UnsupportedModel, match=r"not causal.*choose a model"):
        require_causal(encoder, "the teacher")
    require_causal(decoder, "the teacher")
    assert SIZES["vocab_size"] == decoder.config.vocab_size
