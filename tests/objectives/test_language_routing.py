"""The loss of old languages beside its formula, from rows of data to the gradient of a router."""

import json
import math
from pathlib import Path

import pytest
import torch
from tests.objectives.test_invariants import gradients
from tests.tiny import byte_tokenizer

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.errors import DataError, UnsupportedModel, UsageError
from potstill.core.language import number_language
from potstill.core.types import Signals
from potstill.data.corpus import load_corpus
from potstill.data.packing import collate, pack
from potstill.data.row_reader import Language
from potstill.data.tokenize import tokenize_corpus
from potstill.layers.ffn.experts import ROUTER_LOGITS, Experts
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone, init_weights
from potstill.models.families.registry import export_model
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.language_routing import LanguageRouting
from potstill.stages.distill.config import DistillConfig
from potstill.train.training_module import TrainingModule

ROWS = [
    {"text": f"{word} number {i}", "language": name} for i in range(12) for word, name in (("a", "en"), ("ein", "de"))
]
OBJECTIVE = LanguageRouting(old=("en", "fr"))


def batch_of(*names: str) -> dict[str, torch.Tensor]:
    """A document of two tokens in each language."""
    count = len(names)
    return {
        "input_ids": torch.randint(3, 90, (1, 2 * count)),
        "labels": torch.randint(3, 90, (1, 2 * count)),
        "position_ids": torch.arange(2).repeat(count)[None],
        "documents": torch.arange(count).repeat_interleave(2)[None],
        "languages": torch.tensor([number_language(name) for name in names]).repeat_interleave(2)[None],
    }


def write_rows(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_loss_is_the_cross_entropy_to_the_first_expert_the_mean_over_layers() -> None:
    batch = batch_of("en", "de", "fr")
    needs = OBJECTIVE.needs(batch)["student"]
    assert needs.positions.tolist() == [[True, True, False, False, True, True]]
    assert OBJECTIVE.counts(batch) == {"language_routing": 4}
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, -torch.inf]]).expand(4, 2, 3)
    student = Signals(torch.zeros(4, 1), lambda rows: rows, extras={ROUTER_LOGITS: logits})
    first = math.log(math.e**2 + math.e + 1) - 2
    loss = OBJECTIVE({"student": student}, {}, batch)["language_routing"]
    assert loss.item() == pytest.approx(4 * (first + math.log(2)) / 2)


def test_rows_of_the_data_carry_their_language_to_the_router(tmp_path: Path) -> None:
    corpus = load_corpus(write_rows(tmp_path, ROWS), split="all", label=Language("language"))
    tokenizer = byte_tokenizer()
    packs = pack(tokenize_corpus(corpus, tokenizer), length=64)
    batch = collate([packs[i] for i in range(len(packs))])
    first_letters = batch["input_ids"][batch["position_ids"] == 0]
    numbers = batch["languages"][batch["position_ids"] == 0]
    expected = {tokenizer("a").input_ids[0]: "en", tokenizer("e").input_ids[0]: "de"}
    assert numbers.tolist() == [number_language(expected[int(i)]) for i in first_letters]

    layer = Layer(Attention(2, 1, 8), Experts(SwiGLU(8), 3, weighting="straight_through"))
    backbone = Backbone(Blueprint(len(tokenizer), 16, (layer,) * 2, context=64))
    init_weights(backbone, std=0.3)
    objective = ObjectiveConfig(name="cross_entropy+0.1*language_routing:old=en").build()
    module = TrainingModule(export_model(backbone).double(), objective)
    found = gradients(module, batch)
    assert all(gradient.abs().max() > 0 for name, gradient in found.items() if "router" in name)
    alone = TrainingModule(module.student, ObjectiveConfig(name="1*language_routing:old=en").build())
    before = alone(**batch)["loss"]
    before.backward()
    with torch.no_grad():
        for name, weight in alone.student.named_parameters():
            if "router" in name:
                weight -= weight.grad
    assert alone(**batch)["loss"] < before


def test_the_column_is_that_of_the_objective() -> None:
    objective = ObjectiveConfig(name="1*language_routing:old=en,column=lang")
    assert DistillConfig(teacher="t", student="s", objective=objective).document_label == Language("lang")
    assert DistillConfig(teacher="t", student="s").document_label is None
    with pytest.raises(UsageError, match="omit one of them"):
        DistillConfig(
            teacher=("a=t", "b=u"),
            student="s",
            combine="route:to",
            objective=ObjectiveConfig(name="forward_kl+0.1*language_routing:old=en"),
        )


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name the old languages"):
        ObjectiveConfig(name="1*language_routing").build()
    with pytest.raises(UsageError, match="the text has no languages"):
        OBJECTIVE.counts({key: value for key, value in batch_of("en").items() if key != "languages"})
    with pytest.raises(UnsupportedModel, match="needs experts"):
        OBJECTIVE({"student": Signals(torch.zeros(1, 2), lambda rows: rows)}, {}, batch_of("en"))
    with pytest.raises(DataError, match=r"line 1 has no column `lang` that names its language; it has text, language"):
        load_corpus(write_rows(tmp_path, ROWS), label=Language("lang"))
