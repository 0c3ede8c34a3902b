"""How a model reads documents that may be longer than its context: windows, packs and the mode it reads in.

A document is cut into windows of `width` tokens that end `stride` tokens apart. Each window scores only what the one
before it has not scored, so every token counts once and, except in the first window, has at least `width - stride`
tokens before it:

    tokens    0 1 2 3 4 5 6 7 8 9
    window 1  * * * *                     width 4, stride 2; * is scored, . is read as context
    window 2      . . * *
    window 3          . . * *
    window 4              . . * *
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from potstill.core.errors import UsageError
from potstill.core.types import IGNORE, Batch
from potstill.models.evaluating import evaluating
from potstill.models.signals import network


class Row(NamedTuple):
    """One tokenised document: `labels` are `input_ids` where a token is scored, else `IGNORE`; never shifted.

    `size` is the UTF-8 bytes that the scored tokens stand for. The first `prefix` tokens (a BOS) open every window.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    size: int
    prefix: int = 0


class Window(NamedTuple):
    """Tokens `start` to `stop` of row number `row`, of which those from `fresh` on are scored."""

    row: int
    start: int
    fresh: int
    stop: int


class Pack(NamedTuple):
    """Windows end to end as one packed batch; `owners[w]` is the row that window w belongs to."""

    batch: Batch
    owners: Int[Tensor, " W"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How documents are read. `stride` None is half a window; `vocabulary` cuts the head to the ids that exist.

    `batch_tokens` and `chunk` (the rows whose logits are alive at once) bound the memory and change no number. `dtype`
    is what the model computes in, where that is not what its weights are stored in.
    """

    context: int = 2048
    stride: int | None = None
    batch_tokens: int = 4096
    chunk: int = 512
    vocabulary: int | None = None
    dtype: torch.dtype | None = None

    def within(self, *models: PreTrainedModel) -> "Reading":
        """The same reading with a context that every one of `models` can take in."""
        return replace(self, context=min([self.context, *(context_of(model) for model in models)]))


def context_of(model: PreTrainedModel) -> int:
    """The longest context that the model states; unbounded (2**31) where it states none, as recurrent models do."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(stated) if stated else 2**31


def require_context(context: int, *models: PreTrainedModel) -> None:
    """Refuse windows that one of `models` cannot take in.

    Raises: UsageError.
    """
    for model in models:
        if context > context_of(model):
            raise UsageError(
                f"--context {context} is longer than the {context_of(model)} tokens that {type(model).__name__} was "
                f"made for; ask for less"
            )


def windows(rows: Sequence[Row], reading: Reading) -> list[Window]:
    """The windows of all rows that score something, the longest first, so that padded batches waste little.

    Raises: UsageError if the stride is below 1 or leaves a window no context.
    """
    cut = [window for number, row in enumerate(rows) for window in _windows_of(row, number, reading)]
    return sorted(cut, key=lambda window: window.start - window.stop)


def _windows_of(row: Row, number: int, reading: Reading) -> Iterator[Window]:
    width = reading.context - row.prefix
    stride = max(1, reading.context // 2) if reading.stride is None else reading.stride
    if stride < 1 or width < 2 or (stride >= width and len(row.input_ids) > reading.context):
        raise UsageError(f"stride {stride} needs to be at least 1 and below the window of {width} tokens")
    fresh, end = row.prefix, len(row.input_ids)
    stop = min(row.prefix + width, end)
    while fresh < end:
        if any(label != IGNORE for label in row.labels[fresh:stop]):
            yield Window(number, max(row.prefix, stop - width), fresh, stop)
        fresh, stop = stop, min(stop + stride, end)


def packs(rows: Sequence[Row], reading: Reading, *, device: torch.device | str = "cpu") -> Iterator[Pack]:
    """All windows of `rows` as packed batches of about `reading.batch_tokens` tokens."""
    pending: list[Window] = []
    tokens = 0
    for window in windows(rows, reading):
        length = window.stop - window.start + rows[window.row].prefix
        if pending and tokens + length > reading.batch_tokens:
            yield pack(rows, pending, device=device)
            pending, tokens = [], 0
        pending.append(window)
        tokens += length
    if pending:
        yield pack(rows, pending, device=device)


def pack(rows: Sequence[Row], chosen: Sequence[Window], *, device: torch.device | str = "cpu") -> Pack:
    """The `chosen` windows end to end, each a document of its own; what a window only reads is `IGNORE`d."""
    ids: list[int] = []
    labels: list[int] = []
    places: list[int] = []
    documents: list[int] = []
    for number, (owner, start, fresh, stop) in enumerate(chosen):
        row = rows[owner]
        seen = [*row.input_ids[: row.prefix], *row.input_ids[start:stop]]
        scored = row.labels[max(fresh, start + (row.prefix == 0)) : stop]
        ids += seen
        labels += [IGNORE] * (len(seen) - len(scored)) + list(scored)
        places += range(len(seen))
        documents += [number] * len(seen)
    columns = {"input_ids": ids, "labels": labels, "position_ids": places, "documents": documents}
    batch = {name: torch.tensor([column], device=device) for name, column in columns.items()}
    return Pack(batch, torch.tensor([window.row for window in chosen]))


@contextmanager
def at_rest(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> Iterator[None]:
    """The model in eval mode, without gradients, computing in `dtype`; afterwards each module is as it was."""
    network(model)  # probed in the weights' own dtype, since autocast would round what the probe compares
    mixed = dtype is not None and dtype != model.dtype
    with evaluating(model), torch.no_grad(), torch.autocast(model.device.type, dtype=dtype, enabled=mixed):
        yield
