"""A job that is no language model, in new lines alone: a token classifier on a tiny BERT, with tags as targets."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tests.models.networks import BERT, build
from tests.train.small import settings
from transformers import BertForTokenClassification, BertLMHeadModel, LlamaForCausalLM

from potstill.core.errors import UnsupportedModel
from potstill.core.types import IGNORE, Batch, Needs, Signals, Terms, supervised_positions
from potstill.data.packing import Packs, collate, pack
from potstill.data.token_dataset import TokenizedDocument
from potstill.objectives.cross_entropy import CrossEntropy
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.weighted_sum import WeightedSum
from potstill.train.run import train
from potstill.train.training_module import TrainingModule

TAGS = 3


def tagged_packs(documents: int = 200) -> Packs:
    """Random documents whose tags are those of their tokens; the first token of each has none."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in torch.randint(4, 30, (documents,), generator=generator).tolist():
        ids = torch.randint(5, 97, (length,), generator=generator)
        tags = torch.where(ids < 40, 0, torch.where(ids < 70, 1, 2))
        tags[0] = IGNORE
        rows.append(TokenizedDocument(ids.tolist(), [IGNORE] * length, {"targets": tags.tolist()}))
    return pack(rows, length=32, seed=1)


def test_a_token_classifier_is_trained_on_the_targets_of_packs(tmp_path: Path) -> None:
    packs, model = tagged_packs(), build(BertForTokenClassification, BERT, num_labels=TAGS)
    module = TrainingModule(model, CrossEntropy())
    with torch.no_grad():
        before = module(**collate([packs[0]]))["loss"].item()
    result = train(module, packs, settings(tokens=40 * 64, learning_rate=3e-3, save_every=0), tmp_path, show=False)
    with torch.no_grad():
        after = module.eval()(**collate([packs[0]]))["loss"].item()
    assert result.finished
    assert after < before / 2


def test_a_token_classifier_learns_from_another_one(tmp_path: Path) -> None:
    packs, teacher = tagged_packs(20), build(BertForTokenClassification, BERT, num_labels=TAGS, num_hidden_layers=3)
    student = build(BertForTokenClassification, BERT, num_labels=TAGS)
    objective = WeightedSum((0.5, CrossEntropy()), (0.5, LogitDistillation()))
    result = train(
        TrainingModule(student, objective, frozen={"teacher": teacher}), packs, settings(), tmp_path, show=False
    )
    assert result.finished
    copy = TrainingModule(teacher, LogitDistillation(), frozen={"teacher": teacher})
    with torch.no_grad():
        assert copy(**collate([packs[0]]))["loss"].item() < 1e-5


def test_without_targets_a_network_that_sees_the_next_token_is_refused() -> None:
    batch = collate([tagged_packs(4)[0]])
    batch["labels"] = batch.pop("targets").where(batch["position_ids"] == 0, batch["input_ids"])
    module = TrainingModule(build(BertLMHeadModel, BERT), CrossEntropy())
    with pytest.raises(UnsupportedModel, match="the student is not causal"):
        module(**batch)


@dataclass(frozen=True)
class MeanRow:
    """The sum of the first token's row of each document: an objective over positions of its own."""

    additive: ClassVar[bool] = True
    weights: ClassVar[Mapping[str, float]] = {"first": 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        return {"student": Needs(batch["position_ids"] == 0, layers=frozenset({1}))}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        return {"first": int((batch["position_ids"] == 0).sum())}

    def __call__(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms:
        return {"first": views["student"].rows.sum() + views["student"].layers[1].sum()}


def test_objectives_over_different_positions_share_one_pass_and_get_their_own_rows(
    tiny_llama: LlamaForCausalLM,
) -> None:
    ids = torch.randint(3, 250, (1, 20), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = IGNORE
    batch = collate([{"input_ids": ids[0], "labels": labels[0], "lengths": torch.tensor([12, 8])}])
    separate = [TrainingModule(tiny_llama, part)(**batch)["sums"] for part in (CrossEntropy(), MeanRow())]
    passes = []
    handle = tiny_llama.model.register_forward_hook(lambda *_: passes.append(1))
    together = TrainingModule(tiny_llama, WeightedSum((0.5, CrossEntropy()), (0.5, MeanRow())))
    passes.clear()
    united = together(**batch)["sums"]
    handle.remove()
    assert len(passes) == 1
    torch.testing.assert_close(united, torch.cat(separate))
    assert not bool((supervised_positions(batch)[0] & (batch["position_ids"] == 0))[0, 0])
