"""The products that a benchmark lists for an objective are those that a step of it computes."""

from typing import Any

import pytest
import torch
from benchmarks.setting.products import Linear, Network, of_a_step, seconds
from tests.data.trained import byte_level, sentencepiece
from tests.objectives.crossed import TEXTS, batch_of, llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from potstill.core.types import get_view, supervised_positions
from potstill.evaluate.size import list_matrix_shapes
from potstill.models.families.registry import read_blueprint
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.model_info import ModelInfo, PairInfo
from potstill.ops import layout
from potstill.train.training_module import TrainingModule

ALIKE, ACROSS = ("forward_kl", "tie_kd", "dskd", "dskdv2"), ("uld", "mined", "spans", "dskd_cma", "dskdv2_eta")
ONE_TOKENIZER = ("input_ids", "labels", "position_ids", "documents")
aten = torch.ops.aten
MATRICES = {aten.mm: (0, 1), aten.addmm: (1, 2), aten.addmm_: (1, 2)}  # where the two factors stand


class Counter(TorchDispatchMode):
    """Counts the operations of matrix products, a multiply-add as two; attention's kernel is none."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (places := MATRICES.get(func.overloadpacket)) is not None:
            a, b = (args[place] for place in places)
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def network(model: LlamaForCausalLM, batch: dict[str, Tensor], vocabulary: int) -> Network:
    rows = len(supervised_positions(batch)[1])
    return Network(
        batch["input_ids"].numel(),
        rows,
        model.config.hidden_size,
        vocabulary,
        list_matrix_shapes(read_blueprint(model.config)),
    )


@pytest.mark.parametrize("name", [*ALIKE, *ACROSS])
def test_the_products_that_are_listed_are_those_that_a_step_computes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "ROW_MULTIPLE", 1)  # of so few rows as here, most would be those that are filled up
    torch.manual_seed(0)  # the rows that a dual space reads follow from the weights
    across = name in ACROSS
    ours, theirs = byte_level(), sentencepiece() if across else byte_level()
    student, teacher = llama(ours, 32, 1).float(), llama(theirs, 48, 2).float()
    sides = PairInfo(ModelInfo(student, ours), ModelInfo(teacher, theirs))
    objective: Any = ObjectiveConfig(name=name).build(sides)
    vocabularies = dict(zip(("student", "teacher"), sides.vocab_sizes, strict=True))
    study = TrainingModule(student, objective, frozen={"teacher": teacher}, vocabulary=vocabularies)
    batch = batch_of(TEXTS, ours, theirs)
    batch = batch if across else {key: batch[key] for key in ONE_TOKENIZER}
    pair = [
        network(model, get_view(batch, one) if across else batch, vocabularies[one])
        for one, model in (("student", student), ("teacher", teacher))
    ]
    listed = of_a_step(*pair, objective.parts[1][1], batch)
    with Counter() as counter:
        study(**batch)["loss"].backward()
    found = counter.flops / sum(one.flops for one in listed)
    assert 0.97 < found < (1.07 if "dskd" in name else 1.02)  # dual spaces ask the student's head twice of one state


def test_products_take_time_and_none_takes_none() -> None:
    one = Linear(64, 128, 256, "frw")
    assert one.flops == 3 * 2 * 64 * 128 * 256
    assert seconds([one, one._replace(dtype="float32")]) > 0
