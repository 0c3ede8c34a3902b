"""Packed documents as padded rows, one document a row, for a network that would mix what is packed; round shapes.

The definition: with documents d = 0, 1, ... in the order in which they lie in the batch, document d becomes row d, its
tokens keep their order, and the rest of the row is padding. So whatever is read in the order of the batch (the rows of
a network at the supervised positions) comes in the same order before and after.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Int
from torch import Tensor

# What a padded cell holds: no document, a label that is not trained on (core.types.IGNORE), for a declared field its
# fill value, and zero for all else, since zero is a token that every vocabulary has.
PADDING: dict[str, int | float] = {"labels": -100, "documents": -1}
ROW_MULTIPLE = (
    32  # what a number of rows is rounded up to before they are multiplied, and of tokens before they are read
)


def unpack(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same documents as padded rows `[B T]`, in the order of the batch; the batch may be padded itself.

    Every tensor with the shape of `input_ids` is laid out anew (a mask of positions too). All else is passed on: a
    value per document `[documents]` is found by the document's number in either layout.
    """
    cells = compute_cells(batch["position_ids"], batch["documents"])
    shape = batch["input_ids"].shape
    return {
        name: gather_cells(value, cells, padding=PADDING.get(name, 0)) if value.shape == shape else value
        for name, value in batch.items()
    }


def gather_cells(values: Tensor, cells: Int[Tensor, "R W"], *, padding: int | float = 0) -> Tensor:
    """`values [B T ...]` laid out as `[R W ...]`: cell (r, w) holds the value number `cells[r, w]`, or `padding`."""
    rows = values.flatten(0, 1)[cells.clamp(min=0)]
    is_token = (cells >= 0).reshape(*cells.shape, *[1] * (values.ndim - 2))
    return rows.masked_fill(~is_token, padding)


def compute_cells(position_ids: Int[Tensor, "B T"], documents: Int[Tensor, "B T"]) -> Int[Tensor, "R W"]:
    """For each cell of the padded layout the number b T + t of the token that it holds, -1 for padding."""
    (tokens,) = torch.nonzero((documents >= 0).flatten(), as_tuple=True)
    if not len(tokens):
        return tokens.new_zeros(0, 0)
    row = mark_document_starts(position_ids, documents).flatten()[tokens].cumsum(0) - 1
    lengths = torch.bincount(row)
    column = torch.arange(len(tokens), device=tokens.device) - (lengths.cumsum(0) - lengths)[row]
    cells = tokens.new_full((len(lengths), int(lengths.max())), -1)
    cells[row, column] = tokens
    return cells


def mark_document_starts(position_ids: Int[Tensor, "B T"], documents: Int[Tensor, "B T"]) -> Tensor:
    """True `[B T]` at the first token of each document: position 0, or another number than its left neighbour.

    What it says of padding means nothing.
    """
    is_start = position_ids == 0
    is_start[:, :1] = True
    is_start[:, 1:] |= documents[:, 1:] != documents[:, :-1]
    return is_start


def pad_to_multiple(x: Tensor, dim: int = 0) -> Tensor:
    """`x`, where it is longer than 32 along `dim`, with zeros after it up to a multiple of 32.

    On a CPU oneDNN compiles a kernel for every shape that it multiplies in bf16, and keeps a thousand of them, half a
    MiB each, spread over the heap: with rows of any number, every step compiles some, and a run's memory grows.
    """
    size = x.shape[dim]
    if size <= ROW_MULTIPLE or size % ROW_MULTIPLE == 0:
        return x
    return torch.cat([x, torch.zeros_like(x.narrow(dim, 0, -size % ROW_MULTIPLE))], dim)


def apply_padded(linear: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """`linear(rows)`, multiplied as so many rows as `evened` makes of them."""
    return linear(pad_to_multiple(rows))[: len(rows)]
