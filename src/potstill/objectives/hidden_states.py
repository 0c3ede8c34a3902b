"""Hidden states of some layers, brought to the teacher's width."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from potstill.core.errors import UsageError
from potstill.core.types import Batch, Needs, Signals, Terms
from potstill.objectives.row_matching import make_row_needs, match_aligned_rows
from potstill.ops.layout import apply_padded


class HiddenStates(nn.Module):
    """sum over rows and pairs of layers of ||h_s A - h_t||^2 / ||h_t||^2, divided by the number of pairs.

    h_s A is the student's state at a layer through a map without bias that is learned for that pair of layers and
    thrown away at the end; layer 0 is the embeddings, the last one comes after the final norm. 1 is what a student
    reaches that says nothing. Across tokenizers rows are the batch's `pairs`. The teacher gets no gradient; the student
    gets it below its layers.

    Source: the learned map of FitNets (arXiv:1412.6550) and TinyBERT (arXiv:1909.10351, eq. 8). Departs from both:
    they take the mean square over the width, which is this times the mean square of h_t. Layers of a language model
    differ in that by thousands, and a document's first tokens from all others too, and would decide alone.

    Raises: UsageError where there is no pair of layers.
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
            raise UsageError("hidden states of no layer are compared; give at least one pair of layers")
        self.layers, self.teacher, self.name = tuple(layers), teacher, name
        self.maps = nn.ModuleList(nn.Linear(*widths, bias=False) for _ in self.layers)

    @property
    def weights(self) -> Mapping[str, float]:
        """The one term, weighing 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The layers of both."""
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
    """`2-6/12-30` as pairs of a layer of the student and one of the teacher.

    Raises: UsageError where it is none.
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
    """The last layers of both, and others at the same shares of their depths; fewer where one has fewer."""
    n = min(num_pairs, *depths)
    student_layers, teacher_layers = ([round((i + 1) * depth / n) for i in range(n)] for depth in depths)
    return list(zip(student_layers, teacher_layers, strict=True))
