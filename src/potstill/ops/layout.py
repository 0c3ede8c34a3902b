"""Lays out documents anew: as padded rows, or each with its own copy of a shared prompt; rounds shapes.

`unpack` is for models with attention across packed documents. The definition: document d, in the order of the batch,
becomes row d. Its tokens keep their order, and the rest of the row is padding. So a model gives its rows at the
supervised positions in the same order.

`repeat_prompts` is for models that cannot share prompts. It puts the tokens of the prompt, without labels, before those
of each continuation (`core.types`). Rows at supervised positions stay the same, and in the same order.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

# The values of padded cells: no document, a label without loss (core.types.IGNORE), the fill value of a declared field,
# and 0 for everything else, since every vocabulary has a token 0.
PADDING: dict[str, int | float] = {"labels": -100, "documents": -1}
# The keys whose value is the same at all tokens of a document, so that a repeated prompt has its continuation's.
DOCUMENT_KEYS = {"documents", "sampled"}
# The keys whose value at a token of a repeated prompt is that of the same token of the shared prompt.
PROMPT_KEYS = {"input_ids", "position_ids", "noise.keys", "noise.scales"}
ROW_MULTIPLE = 32  # numbers of rows (before a product) and of tokens (before a forward) are rounded up to multiples


def unpack(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same documents as padded rows `[B T]`, in the order of the batch; the batch may be padded itself.

    Each continuation of a shared prompt is a whole document here (`repeat_prompts`).
    It lays out every tensor with the shape of `input_ids` (a mask of positions too), and returns all others unchanged.
    The document's number finds a value per document `[documents]` in both layouts.
    """
    batch = repeat_prompts(batch)
    cells = compute_cells(batch["position_ids"], batch["documents"])
    shape = batch["input_ids"].shape
    return {
        name: gather_cells(value, cells, padding=PADDING.get(name, 0)) if value.shape == shape else value
        for name, value in batch.items()
    }


def repeat_prompts(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same documents as one packed row in which every continuation begins with the tokens of its prompt.

    It lays out every tensor with the shape of `input_ids`. The repeated tokens have the positions and the noise of the
    prompt, the number and the routes of the continuation, and no labels or other values. `offsets` become 0; other
    values per document, and `pairs`, stay. A batch without continuations is returned as it is.
    """
    documents = _find_documents(batch["position_ids"], batch["documents"])
    if not bool(documents.prefix_lengths.any()):
        return batch
    totals = documents.prefix_lengths + documents.lengths
    numbers = torch.repeat_interleave(torch.arange(len(totals), device=totals.device), totals)
    columns = torch.arange(len(numbers), device=totals.device) - (totals.cumsum(0) - totals)[numbers]
    own_columns = columns - documents.prefix_lengths[numbers]
    in_prefix = own_columns < 0
    own_tokens = documents.tokens[documents.starts[numbers] + own_columns.clamp(min=0)]
    prompt_tokens = documents.tokens[documents.starts[documents.prompts[numbers]] + columns]
    tokens = torch.where(in_prefix, prompt_tokens, own_tokens)
    repeated = dict(batch)
    for name, values in batch.items():
        if values.shape == batch["input_ids"].shape:
            is_shared, padding = name in PROMPT_KEYS, PADDING.get(name, 0)
            row = values.flatten()[tokens if is_shared else own_tokens]
            repeated[name] = (row if is_shared or name in DOCUMENT_KEYS else row.masked_fill(in_prefix, padding))[None]
    if "labels" in batch:  # the first token of a document is not predicted, and in the whole document it would be
        is_first = (own_columns == 0) & (columns > 0)
        repeated["labels"] = repeated["labels"].masked_fill(is_first, PADDING["labels"])
    return repeated if "offsets" not in batch else repeated | {"offsets": torch.zeros_like(batch["offsets"])}


class _Documents(NamedTuple):
    """The tokens of a batch that are no padding, as indices b T + t, and the documents that they make up.

    A document's `starts` and `lengths` count these tokens. `prompts` is the document that holds its prompt, whose first
    `prefix_lengths` tokens it sees.
    """

    tokens: Int[Tensor, " N"]
    starts: Int[Tensor, " D"]
    lengths: Int[Tensor, " D"]
    prompts: Int[Tensor, " D"]
    prefix_lengths: Int[Tensor, " D"]


def _find_documents(position_ids: Int[Tensor, "B T"], documents: Int[Tensor, "B T"]) -> _Documents:
    (tokens,) = torch.nonzero((documents >= 0).flatten(), as_tuple=True)
    is_start = mark_document_starts(position_ids, documents).flatten()[tokens]
    (starts,) = torch.nonzero(is_start, as_tuple=True)
    lengths = torch.diff(starts, append=starts.new_tensor([len(tokens)]))
    firsts = position_ids.flatten()[tokens[starts]]
    rows = torch.div(tokens[starts], max(position_ids.shape[1], 1), rounding_mode="floor")
    places = torch.arange(len(starts), device=tokens.device)
    last_prompts = torch.where(firsts == 0, places, -1).cummax(0).values
    prompts = last_prompts.clamp(min=0)
    has_prompt = (firsts > 0) & (last_prompts >= 0) & (rows[prompts] == rows)
    prompts = prompts.where(has_prompt, places)
    return _Documents(tokens, starts, lengths, prompts, firsts.minimum(lengths[prompts]) * has_prompt)


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

    A continuation is a document of its own here, also right after its prompt.

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
