"""Unpacks documents into padded rows, for models with attention across packed documents; rounds shapes.

The definition: document d, in the order of the batch, becomes row d. Its tokens keep their order, and the rest of the
row is padding. So a model gives its rows at the supervised positions in the same order.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

# The values of padded cells: no document, a label without loss (core.types.IGNORE), the fill value of a declared field,
# and 0 for everything else, since every vocabulary has a token 0.
PADDING: dict[str, int | float] = {"labels": -100, "documents": -1}
ROW_MULTIPLE = 32  # numbers of rows (before a product) and of tokens (before a forward) are rounded up to multiples


def unpack(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same documents as padded rows `[B T]`, in the order of the batch; the batch may be padded itself.

    It lays out every tensor with the shape of `input_ids` (a mask of positions too), and returns all others unchanged.
    The document's number finds a value per document `[documents]` in both layouts.
    """
    cells = compute_cells(batch["position_ids"], batch["documents"])
    shape = batch["input_ids"].shape
    return {
        name: gather_cells(value, cells, padding=PADDING.get(name, 0)) if value.shape == shape else value
        for name, value in batch.items()
    }


def gather_cells(values: Tensor, cells: Int[Tensor, "R W"], *, padding: int | float = 0) -> Tensor:
    """`values [B T ...]` laid out as `[R W ...]`: cell (r, w) holds the value of index `cells[r, w]`, or `padding`."""
    rows = values.flatten(0, 1)[cells.clamp(min=0)]
    is_token = (cells >= 0).reshape(*cells.shape, *[1] * (values.ndim - 2))
    return rows.masked_fill(~is_token, padding)


def compute_cells(position_ids: Int[Tensor, "B T"], documents: Int[Tensor, "B T"]) -> Int[Tensor, "R W"]:
    """For each cell of the padded layout the index b T + t of its token, -1 for padding."""
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
    """True `[B T]` at the first token of each document: position 0, or another document than its left neighbor.

    The values at padding have no meaning.
    """
    is_start = position_ids == 0
    is_start[:, :1] = True
    is_start[:, 1:] |= documents[:, 1:] != documents[:, :-1]
    return is_start


def pad_to_multiple(x: Tensor, dim: int = 0) -> Tensor:
    """`x` padded with zeros along `dim` to a multiple of 32, if it is longer than 32.

    On a CPU, oneDNN compiles a kernel for every shape of a bf16 product. It keeps up to a thousand of them, half a MiB
    each. With arbitrary numbers of rows, every step would compile some, and a run's memory would grow.
    """
    size = x.shape[dim]
    if round_up(size) == size:
        return x
    return torch.cat([x, torch.zeros_like(x.narrow(dim, 0, round_up(size) - size))], dim)


def round_up(size: int) -> int:
    """The multiple of 32 that `pad_to_multiple` pads to."""
    return size if size <= ROW_MULTIPLE else size + -size % ROW_MULTIPLE


def stack_ragged(tensors: Sequence[Tensor], dim: int, *, padding: float) -> Tensor:
    """`torch.stack` of tensors whose last dimensions differ: the shorter ones get `padding` at their ends."""
    size = max(tensor.shape[-1] for tensor in tensors)
    padded = [pad(tensor, (0, size - tensor.shape[-1]), value=padding) for tensor in tensors]
    return torch.stack(padded, dim)


def apply_padded(linear: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """`linear(rows)`, computed on rows padded by `pad_to_multiple`."""
    return linear(pad_to_multiple(rows))[: len(rows)]
