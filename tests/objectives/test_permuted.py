"""One vocabulary under other ids, from text to gradient: a teacher that reads by them teaches what it did before."""

import copy
import json
from typing import NamedTuple

import pytest
import torch
from tests.data.cross_tokenizer.test_packs import TEXTS, pack_of
from tests.data.trained import byte_level
from tests.objectives.crossed import llama, taught
from tests.objectives.enumerated import ACROSS_METHODS as ACROSS
from tests.objectives.test_invariants import gradients
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.types import ALIGNED_GROUPS, ALIGNED_PAIRS, EDIT_ALIGNED_PAIRS, supervised_positions
from potstill.data.cross_tokenizer.packs import CrossTokenizerPacks, TokenizerInfo
from potstill.data.packing import collate
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.model_info import ModelInfo, PairInfo
from potstill.train.training_module import TrainingModule

ALONE = {"dskdv2_eta": "dskdv2", "mined": "forward_kl", "spans": "forward_kl"}  # all others are their own counterpart
END = "</s>"


def tokenizer_of(order: Tensor | None = None) -> PreTrainedTokenizerFast:
    """`byte_level()`, its end of text the one special token, with the id `order[i]` for what had the id i."""
    spec = json.loads(byte_level().backend_tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] == END]
    if order is not None:
        vocabulary = spec["model"]["vocab"]
        vocabulary.update({token: int(order[i]) for token, i in vocabulary.items()})
        spec["added_tokens"][0]["id"] = vocabulary[END]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token=END)


class Permuted(NamedTuple):
    """A student and a teacher of one tokenizer, and the same with that teacher's ids exchanged."""

    alike: PairInfo
    across: PairInfo
    ids: Tensor  # the exchanged teacher's id of each of the student's


@pytest.fixture(scope="module")
def permuted() -> Permuted:
    tokenizer = tokenizer_of()
    student, teacher = llama(tokenizer, 32, 1), llama(tokenizer, 48, 2)
    ids = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(3))
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        for layer in (other.get_input_embeddings(), other.get_output_embeddings()):
            layer.weight.copy_(layer.weight[ids.argsort()])
    sides = (
        PairInfo(ModelInfo(student, tokenizer), ModelInfo(*one))
        for one in ((teacher, tokenizer), (other, tokenizer_of(ids)))
    )
    return Permuted(*sides, ids)


def batches(permuted: Permuted) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two packs of text as the student reads them, alone and beside the exchanged teacher."""
    mine, yours = (
        TokenizerInfo.from_tokenizer(side.tokenizer) for side in (permuted.across.student, permuted.across.teacher)
    )
    packs = [pack_of(TEXTS, mine, prompt=3), pack_of(TEXTS[::-1], mine)]
    paired = CrossTokenizerPacks(packs, mine, yours, needs_edit_alignment=True)
    return collate(packs), collate([paired[i] for i in range(len(packs))])


def study_of(sides: PairInfo, name: str) -> TrainingModule:
    torch.manual_seed(0)
    objective = ObjectiveConfig.parse(name, cross_entropy=0.0, temperature=1.5).build(sides)
    assert isinstance(objective, torch.nn.Module)
    student, teacher = copy.deepcopy(sides.student.model), sides.teacher.model
    assert isinstance(teacher, LlamaForCausalLM)
    return TrainingModule(student, objective.double(), frozen={"teacher": teacher})


def test_the_exchanged_teacher_reads_every_text_by_other_ids_and_is_the_same_function(permuted: Permuted) -> None:
    alone, beside = batches(permuted)
    ids = permuted.ids
    assert torch.equal(beside["teacher.input_ids"], ids[alone["input_ids"]])
    assert (beside["teacher.input_ids"] != alone["input_ids"]).float().mean() > 0.9
    assert permuted.across.num_shared_ids is None
    assert torch.equal(permuted.across.shared_token_ids, torch.stack([torch.arange(len(ids)), ids]))
    assert torch.equal(permuted.across.nearest_ids, ids.argsort())
    said = [
        sides.teacher.model(input_ids=read, position_ids=alone["position_ids"], use_cache=False).logits
        for sides, read in ((permuted.alike, alone["input_ids"]), (permuted.across, beside["teacher.input_ids"]))
    ]
    torch.testing.assert_close(said[1][..., ids], said[0])


def test_every_row_is_paired_with_itself_by_every_table(permuted: Permuted) -> None:
    alone, beside = batches(permuted)
    rows = torch.arange(len(supervised_positions(alone)[1]))
    assert len(rows) > 40
    for key, table in (
        (ALIGNED_PAIRS, rows.expand(2, -1)),
        (EDIT_ALIGNED_PAIRS, rows.expand(2, -1)),
        *((key, rows) for key in ALIGNED_GROUPS),
    ):
        assert torch.equal(beside[key], table), key


@pytest.mark.parametrize("name", ACROSS)
def test_a_method_between_two_tokenizers_gives_the_loss_and_gradient_of_its_counterpart_with_one(
    name: str, permuted: Permuted
) -> None:
    alone, beside = batches(permuted)
    across, alike = study_of(permuted.across, name), study_of(permuted.alike, ALONE.get(name, name))
    for key, weight in alike.named_parameters():
        torch.testing.assert_close(across.get_parameter(key), weight, msg=key)
    across.load_state_dict(taught(alike, alone).state_dict())
    found, expected = across(**beside), alike(**alone)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-9, atol=0)
    torch.testing.assert_close(found["sums"][: len(expected["sums"])], expected["sums"], rtol=1e-9, atol=0)
    assert not found["sums"][len(expected["sums"]) :].any(), "no text is compared as a run of several tokens"
    ours, theirs = gradients(across, beside), gradients(alike, alone)
    assert ours.keys() == theirs.keys()
    assert any(g.abs().max() > 1e-3 for g in theirs.values())
    for key, g in theirs.items():
        torch.testing.assert_close(ours[key], g, rtol=1e-7, atol=1e-10, msg=key)
