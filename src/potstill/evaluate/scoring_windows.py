"""Cuts documents that may be longer than a model's context into windows, and packs the windows into batches.

A document is cut into windows of `width` tokens that end `stride` tokens apart. Each window scores only the tokens
that the window before it did not score. So every token counts once and, except in the first window, has at least
`width - stride` tokens before it:

    tokens    0 1 2 3 4 5 6 7 8 9
    window 1  * * * *                     width 4, stride 2; * is scored, . is context
    window 2      . . * *
    window 3          . . * *
    window 4              . . * *
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from potstill.core.errors import UsageError
from potstill.core.types import IGNORE, Batch
from potstill.models.inference import get_max_context


class Row(NamedTuple):
    """A tokenized document: `labels` are `input_ids` where a token is scored, else `IGNORE`; they are not shifted.

    `num_bytes` is the UTF-8 size of the scored text. The first `prefix_length` tokens (a BOS) begin every window.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    num_bytes: int
    prefix_length: int = 0


class Window(NamedTuple):
    """Tokens `start` to `stop` of the row with index `row`, scored from `score_start` on."""

    row: int
    start: int
    score_start: int
    stop: int


class Pack(NamedTuple):
    """Windows one after another as a packed batch; `row_indices[w]` is the row of window w."""

    batch: Batch
    row_indices: Int[Tensor, " W"]


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How documents are scored. `stride` None is half a window; `vocabulary` crops the head to the ids that exist.

    `batch_tokens` and `chunk` (the rows whose logits are in memory at once) limit memory and change no result. `dtype`
    is the dtype to compute in, where it is not that of the weights.
    """

    context: int = 2048
    stride: int | None = None
    batch_tokens: int = 4096
    chunk: int = 512
    vocabulary: int | None = None
    dtype: torch.dtype | None = None

    def limit_to_context(self, *models: PreTrainedModel) -> "ScoringConfig":
        """This configuration with `context` reduced to the shortest context of `models`."""
        return replace(self, context=min([self.context, *(get_max_context(model) for model in models)]))


def check_context(context: int, *models: PreTrainedModel, option: str = "--context") -> None:
    """Refuse windows longer than the context of one of `models`; `option` set their length.

    Raises: UsageError.
    """
    for model in models:
        if context > get_max_context(model):
            raise UsageError(
                f"{option} {context} is longer than the {get_max_context(model)} tokens of context that "
                f"{type(model).__name__} has; give a shorter one, or convert the model by --to longer"
            )


def cut_windows(rows: Sequence[Row], config: ScoringConfig) -> list[Window]:
    """All windows that score a token, the longest first, so that padded batches hold little padding.

    Raises: UsageError if the stride is below 1 or as long as a window.
    """
    all_windows = [window for row_index, row in enumerate(rows) for window in _cut_row(row, row_index, config)]
    return sorted(all_windows, key=lambda window: window.start - window.stop)


def _cut_row(row: Row, row_index: int, config: ScoringConfig) -> Iterator[Window]:
    width = config.context - row.prefix_length
    stride = max(1, config.context // 2) if config.stride is None else config.stride
    if stride < 1 or width < 2 or (stride >= width and len(row.input_ids) > config.context):
        raise UsageError(f"stride {stride} must be at least 1 and below the window of {width} tokens")
    score_start, end = row.prefix_length, len(row.input_ids)
    stop = min(row.prefix_length + width, end)
    while score_start < end:
        if any(label != IGNORE for label in row.labels[score_start:stop]):
            yield Window(row_index, max(row.prefix_length, stop - width), score_start, stop)
        score_start, stop = stop, min(stop + stride, end)


def build_packs(rows: Sequence[Row], config: ScoringConfig, *, device: torch.device | str = "cpu") -> Iterator[Pack]:
    """All windows of `rows` as packed batches of at most `config.batch_tokens` tokens, or one longer window."""
    pending_windows: list[Window] = []
    tokens = 0
    for window in cut_windows(rows, config):
        length = window.stop - window.start + rows[window.row].prefix_length
        if pending_windows and tokens + length > config.batch_tokens:
            yield build_pack(rows, pending_windows, device=device)
            pending_windows, tokens = [], 0
        pending_windows.append(window)
        tokens += length
    if pending_windows:
        yield build_pack(rows, pending_windows, device=device)


def build_pack(rows: Sequence[Row], selected_windows: Sequence[Window], *, device: torch.device | str = "cpu") -> Pack:
    """The windows as one packed batch, each a document of its own; labels of context tokens are `IGNORE`."""
    ids: list[int] = []
    labels: list[int] = []
    position_ids: list[int] = []
    documents: list[int] = []
    for number, (row_index, start, score_start, stop) in enumerate(selected_windows):
        row = rows[row_index]
        window_ids = [*row.input_ids[: row.prefix_length], *row.input_ids[start:stop]]
        scored_labels = row.labels[max(score_start, start + (row.prefix_length == 0)) : stop]
        ids += window_ids
        labels += [IGNORE] * (len(window_ids) - len(scored_labels)) + list(scored_labels)
        position_ids += range(len(window_ids))
        documents += [number] * len(window_ids)
    columns = {"input_ids": ids, "labels": labels, "position_ids": position_ids, "documents": documents}
    batch = {name: torch.tensor([column], device=device) for name, column in columns.items()}
    return Pack(batch, torch.tensor([window.row for window in selected_windows]))
