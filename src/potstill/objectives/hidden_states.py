"""Compares hidden states of some layers through learned maps to the teacher's width."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from potstill.core.errors import UsageError
from potstill.core.types import Batch, Needs, Objective, Signals, Terms
from potstill.objectives.cost import CostInputs, ObjectiveCost
from potstill.objectives.model_info import PairInfo
from potstill.objectives.row_matching import make_row_needs, match_aligned_rows
from potstill.objectives.spec import ObjectiveOptions, register_objective
from potstill.ops.layout import apply_padded

LAYER_MAP_OPTION = "map"  # the option that pairs the layers of both models


class HiddenStates(nn.Module):
    """sum over rows and pairs of layers of ||h_s A - h_t||^2 / ||h_t||^2, divided by the number of pairs.

    h_s A is the student's state at a layer through a learned map without bias. Each pair of layers has its own map; the
    maps are discarded after training. Layer 0 is the embeddings, and the last layer comes after the final norm. A
    student whose states are zero has the loss 1. Across tokenizers the rows are the batch's aligned pairs. The teacher
    gets no gradient; the student gets it at and below the compared layers.

    Source: the learned map of FitNets (arXiv:1412.6550) and TinyBERT (arXiv:1909.10351, eq. 8). Departs from both:
    they take the mean square over the width, which is this loss times the mean square of h_t. That factor differs by
    thousands between layers of a language model, and between a document's first tokens and all others. Without the
    division a few of them would dominate the loss.

    Raises: UsageError if there is no pair of layers.
    """

    additive: ClassVar[bool] = True

    def __init__(
        self,
        widths: tuple[int, int],
        layers: Sequence[tuple[int, int]],
        *,
        teacher: str = "teacher",
        name: str = "hidden",
    ) -> None:
        super().__init__()
        if not layers:
            raise UsageError("no pair of layers is given to compare hidden states; give at least one")
        self.layers, self.teacher, self.name = tuple(layers), teacher, name
        self.maps = nn.ModuleList(nn.Linear(*widths, bias=False) for _ in self.layers)

    @property
    def weights(self) -> Mapping[str, float]:
        """One term with weight 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The compared layers of both models."""
        student_layers, teacher_layers = (Needs(layers=frozenset(side)) for side in zip(*self.layers, strict=True))
        row_needs = make_row_needs(batch, self.teacher)
        return {
            "student": row_needs["student"] | student_layers,
            self.teacher: row_needs[self.teacher] | teacher_layers,
        }

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of rows."""
        return {self.name: len(match_aligned_rows(batch)[0])}

    def forward(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms:
        """The sum over the batch."""
        student, teacher, (student_rows, teacher_rows) = (
            views["student"],
            frozen[self.teacher],
            match_aligned_rows(batch),
        )
        total = student.rows.new_zeros((), dtype=torch.promote_types(student.rows.dtype, torch.float32))
        for (student_layer, teacher_layer), to_teacher in zip(self.layers, self.maps, strict=True):
            target = teacher.layers[teacher_layer][teacher_rows].detach().to(total.dtype)
            error = apply_padded(to_teacher, student.layers[student_layer][student_rows]).to(total.dtype) - target
            size = target.square().sum(-1).clamp(min=torch.finfo(total.dtype).tiny)
            total = total + (error.square().sum(-1) / size).sum()
        return {self.name: total / len(self.layers)}


def parse_layer_map(text: str) -> list[tuple[int, int]]:
    """`2-6/12-30` as pairs of a layer of the student and a layer of the teacher.

    Raises: UsageError if the text has another form.
    """
    try:
        return [
            (int(student_layer), int(teacher_layer))
            for student_layer, teacher_layer in (pair.split("-") for pair in text.split("/"))
        ]
    except ValueError as error:
        raise UsageError(
            f"the layer map {text!r} is not STUDENT-TEACHER/STUDENT-TEACHER/..., such as 2-6/12-30"
        ) from error


def check_layers(layers: Sequence[tuple[int, int]], depths: tuple[int, int]) -> None:
    """Refuse pairs of layers that student and teacher do not have.

    Raises: UsageError.
    """
    for pair in layers:
        for network, layer, depth in zip(("student", "teacher"), pair, depths, strict=True):
            if layer > depth:
                raise UsageError(
                    f"the {network} has the layers 0 (its embeddings) to {depth}, and the map names {layer}"
                )


def map_layers_evenly(depths: tuple[int, int], num_pairs: int) -> list[tuple[int, int]]:
    """The last layers of both models, and others at equal shares of their depths; fewer pairs for fewer layers."""
    n = min(num_pairs, *depths)
    student_layers, teacher_layers = ([round((i + 1) * depth / n) for i in range(n)] for depth in depths)
    return list(zip(student_layers, teacher_layers, strict=True))


def hidden_states_cost(inputs: CostInputs) -> ObjectiveCost:
    """One map for each pair of layers, with both gradients."""
    student_width, teacher_width = inputs.widths
    num_layers = len(inputs.student.layers), len(inputs.teacher.layers)
    if layer_map := inputs.options.get(LAYER_MAP_OPTION):
        num_pairs = len(parse_layer_map(str(layer_map)))
    else:
        num_pairs = int(min(float(inputs.options["layers"]), *num_layers))
    return ObjectiveCost(
        other_operations=6.0 * num_pairs * student_width * teacher_width * inputs.aligned_rows,
        weights=num_pairs * student_width * teacher_width,
    )


@register_objective(
    "hidden",
    help="Hidden states of `layers` pairs of layers, or of the pairs in `map` (map=2-6/12-30, the student's first).",
    cost=hidden_states_cost,
    supports_cross_tokenizer=True,
    numeric_options={"layers": 4.0},
    text_options=(LAYER_MAP_OPTION,),
)
def build_hidden(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`HiddenStates` at the layers of the option `map`, else at evenly spaced layers."""
    student, teacher = pair.student, pair.teacher
    depths = student.num_layers, teacher.num_layers
    layers = (
        parse_layer_map(options.text_options[LAYER_MAP_OPTION])
        if LAYER_MAP_OPTION in options.text_options
        else map_layers_evenly(depths, options.get_positive_int("layers"))
    )
    check_layers(layers, depths)
    return HiddenStates((student.hidden_size, teacher.hidden_size), layers, name=options.name)
