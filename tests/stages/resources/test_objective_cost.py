"""What objectives are said to compute and to train, beside what is built and what torch counts."""

from dataclasses import replace

import pytest
import torch
from tests.data.trained import byte_level, sentencepiece
from tests.objectives.enumerated import ALIGNED, ROUTED
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.data.cross_tokenizer.packs import CrossTokenizerPacks, TokenizerInfo
from potstill.data.packing import Packs, collate, pack
from potstill.data.token_dataset import TokenizedDocument
from potstill.models.families.registry import read_blueprint
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.model_info import ModelInfo, PairInfo
from potstill.objectives.registry import OBJECTIVE_SPECS
from potstill.ops import layout
from potstill.stages.resources.dataset_stats import compute_packing_stats, measure_teacher_tokenization
from potstill.stages.resources.workload import Workload
from potstill.train.config import TrainConfig
from potstill.train.training_module import TrainingModule

LINES = ["The quick brown fox jumps over the lazy dog.", "def read(path):\n    return 0", "Schöne naïve 世界 🎉"] * 3
BOUNDS = {  # of means over documents, of all ids as shared, of aligned tokens for what is paired otherwise
    "dskd_cma": 0.05,
    "dskdv2_eta": 0.1,
    "mined": 0.05,
    "relations": 0.05,
    "spans": 0.05,
}
ROOM = TrainConfig(tokens=512, context=512, batch_tokens=512, micro_tokens=512)


def speaking(tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(width)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def packed(tokenizer: PreTrainedTokenizerFast) -> Packs:
    rows = [[*tokenizer(line, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for line in LINES]
    return pack([TokenizedDocument(ids, ids) for ids in rows], length=512)


def pair(mixture: ObjectiveConfig, *, across: bool) -> tuple[TrainingModule, dict[str, torch.Tensor], Workload]:
    """What is trained, a pass, and both as they are counted."""
    ours, theirs = byte_level(), sentencepiece() if across else byte_level()
    student, teacher = speaking(ours, width=32, layers=2), speaking(theirs, width=48, layers=3)
    sides = PairInfo(ModelInfo(student, ours), ModelInfo(teacher, theirs))
    packs, readers = packed(ours), [TokenizerInfo.from_tokenizer(one) for one in (ours, theirs)]
    paired = (
        CrossTokenizerPacks(packs, *readers, needs_edit_alignment=mixture.needs_edit_alignment) if across else packs
    )
    ids = {"student": len(ours), "teacher": len(theirs)}
    study = TrainingModule(student, mixture.build(sides), frozen={"teacher": teacher}, vocabulary=ids)
    work = Workload(
        teacher=read_blueprint(teacher.config),
        student=read_blueprint(student.config),
        vocabulary=len(ours),
        settings=ROOM,
        packing=compute_packing_stats(packs),
        objective=mixture,
        teacher_tokenization=measure_teacher_tokenization(paired, vocabulary=len(theirs)) if across else None,
    )
    return study, collate([paired[i] for i in range(len(packs))]), work


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("name", [name for name in OBJECTIVE_SPECS if name not in (*ROUTED, *ALIGNED)])
def test_the_weights_of_an_objective_are_those_of_what_is_built(name: str, across: bool) -> None:
    mixture = ObjectiveConfig(name=name)
    if across and not mixture.supports_cross_tokenizer:
        pytest.skip("it compares token by token")
    study, _, work = pair(mixture, across=across)
    assert isinstance(study.objective, nn.Module)
    assert work.objective_cost.weights == sum(p.numel() for p in study.objective.parameters())
    alone = replace(work, source="alone")
    assert work.trained_parameters - alone.trained_parameters == work.objective_cost.weights


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(
    "name", [name for name in OBJECTIVE_SPECS if name not in ("minillm", *ROUTED, *ALIGNED)]
)  # whose rows a rollout has to write
def test_the_operations_of_an_objective_are_those_that_torch_counts(
    name: str, across: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but attention, which torch's counter does not see on a CPU, and one product of the head, written in place."""
    monkeypatch.setattr(layout, "ROW_MULTIPLE", 1)  # of so few rows as here, most would be those that are filled up
    mixture = ObjectiveConfig(name=name)
    if across and not mixture.supports_cross_tokenizer:
        pytest.skip("it compares token by token")
    study, batch, work = pair(mixture, across=across)
    with FlopCounterMode(display=False) as counter:
        study(**batch)["loss"].backward()
    student, teacher = work.count_forward_flops(work.student), work.teacher_flops
    found = counter.get_total_flops() + student.head * work.tokens
    attention = (1 + 2.5) * student.attention + teacher.attention
    counted = (sum(work.flops().values()) - attention) * work.tokens
    assert found == pytest.approx(counted, rel=BOUNDS.get(name, 0.01))


def test_hidden_states_alone_ask_for_no_logits() -> None:
    _, _, work = pair(ObjectiveConfig(name="hidden", cross_entropy=0.0), across=True)
    assert work.flops()["head and loss"] * work.tokens == pytest.approx(work.objective_cost.other_operations)


def test_a_teacher_that_reads_more_tokens_computes_and_holds_more() -> None:
    _, _, work = pair(ObjectiveConfig(name="uld"), across=True)
    assert work.teacher_tokenization is not None
    assert work.teacher_tokenization.to_dict().keys() == {
        "aligned_share",
        "teacher_tokens",
        "teacher_rows",
        "teacher_vocabulary",
    }
    twice = replace(
        work,
        teacher_tokenization=work.teacher_tokenization._replace(
            token_ratio=2 * work.teacher_tokenization.token_ratio, vocabulary=9000
        ),
    )
    assert twice.flops()["teacher forward"] == 2 * work.flops()["teacher forward"]
    assert twice.logit_bytes() > work.logit_bytes()
    assert twice.entries_per_row > work.entries_per_row
