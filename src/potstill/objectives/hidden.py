"""Hidden states of some layers, brought to the teacher's width."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from potstill.core.errors import UsageError
from potstill.core.types import Batch, Needs, Signals, Terms
from potstill.objectives.bridge import aligned, each
from potstill.ops.layout import through


class Hidden(nn.Module):
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
        ours, theirs = (Needs(layers=frozenset(side)) for side in zip(*self.layers, strict=True))
        found = each(batch, self.teacher)
        return {"student": found["student"] | ours, self.teacher: found[self.teacher] | theirs}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of rows."""
        return {self.name: len(aligned(batch)[0])}

    def forward(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms:
        """The sum over the batch."""
        student, teacher, (mine, yours) = views["student"], frozen[self.teacher], aligned(batch)
        total = student.rows.new_zeros((), dtype=torch.promote_types(student.rows.dtype, torch.float32))
        for (ours, theirs), to_teacher in zip(self.layers, self.maps, strict=True):
            wanted = teacher.layers[theirs][yours].detach().to(total.dtype)
            error = through(to_teacher, student.layers[ours][mine]).to(total.dtype) - wanted
            size = wanted.square().sum(-1).clamp(min=torch.finfo(total.dtype).tiny)
            total = total + (error.square().sum(-1) / size).sum()
        return {self.name: total / len(self.layers)}


def layer_map(text: str) -> list[tuple[int, int]]:
    """`2-6/12-30` as pairs of a layer of the student and one of the teacher.

    Raises: UsageError where it is none.
    """
    try:
        return [(int(ours), int(theirs)) for ours, theirs in (pair.split("-") for pair in text.split("/"))]
    except ValueError as error:
        raise UsageError(
            f"the layer map {text!r} is not STUDENT-TEACHER/STUDENT-TEACHER/..., such as 2-6/12-30"
        ) from error


def require_layers(layers: Sequence[tuple[int, int]], depths: tuple[int, int]) -> None:
    """Refuse pairs of layers that student and teacher do not have.

    Raises: UsageError.
    """
    for pair in layers:
        for who, layer, depth in zip(("student", "teacher"), pair, depths, strict=True):
            if layer > depth:
                raise UsageError(f"the {who} has the layers 0 (its embeddings) to {depth}, and the map names {layer}")


def evenly(depths: tuple[int, int], pairs: int) -> list[tuple[int, int]]:
    """The last layers of both, and others at the same shares of their depths; fewer where one has fewer."""
    n = min(pairs, *depths)
    ours, theirs = ([round((i + 1) * depth / n) for i in range(n)] for depth in depths)
    return list(zip(ours, theirs, strict=True))
