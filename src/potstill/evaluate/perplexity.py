"""Bits per byte and perplexity of a model on documents.

    bits per byte = sum_t -ln p(x_t | x_<t) / (ln 2 * UTF-8 bytes of the scored text)
    perplexity    = exp(sum_t -ln p(x_t | x_<t) / scored tokens)

Bits per byte can be compared across tokenizers and chat templates, perplexity cannot. The bytes are those of the
document, of a chat those of its answers (`evaluate.answer_rows`). Where the tokenizer begins every text with a BOS,
the first real token is scored too. Without a BOS nothing predicts the first token, and its bytes are not counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import DataError
from potstill.core.types import IGNORE, Needs, Signals, supervised_positions
from potstill.evaluate.scoring_windows import Row, ScoringConfig, build_packs
from potstill.models.inference import inference_context
from potstill.models.signals import compute_signals


@dataclass(frozen=True)
class Scores:
    """For each document the negative log-likelihood in nats of its scored tokens, their number and their bytes."""

    nll: Float[np.ndarray, " n"]
    num_tokens: Int[np.ndarray, " n"]
    num_bytes: Int[np.ndarray, " n"]


def score(model: PreTrainedModel, rows: Sequence[Row], config: ScoringConfig | None = None) -> Scores:
    """The negative log-likelihood of `model` for each row of `rows`; each token is scored once.

    Raises: DataError if no row has a token to score.
    """
    config = (config or ScoringConfig()).limit_to_context(model)
    nll = np.zeros(len(rows))
    with inference_context(model, dtype=config.dtype):
        for batch, row_indices in build_packs(rows, config, device=model.device):
            positions, targets, segment = supervised_positions(batch)
            outputs = compute_signals(model, batch, Needs(positions), vocabulary=config.vocabulary)
            nll += sum_by_row(row_indices[segment.cpu()], compute_nll(outputs, targets, chunk=config.chunk), len(rows))
    return Scores(nll, count_scored_tokens(rows), count_scored_bytes(rows))


def compute_nll(outputs: Signals, targets: Int[Tensor, " N"], *, chunk: int) -> Float[Tensor, " N"]:
    """-ln p(target) of every row in nats; only the logits of `chunk` rows are in memory at once."""
    parts = zip(outputs.rows.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([_compute_chunk_nll(outputs.logits(rows), row_targets) for rows, row_targets in parts])


def _compute_chunk_nll(logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def sum_by_row(row_indices: Int[Tensor, " N"], values: Tensor, num_rows: int) -> Float[np.ndarray, " n"]:
    """The sum of `values` for each of `num_rows` rows, in double precision."""
    return np.bincount(row_indices.numpy(), weights=values.double().cpu().numpy(), minlength=num_rows)


def count_scored_tokens(rows: Sequence[Row]) -> Int[np.ndarray, " n"]:
    """The number of scored tokens in each row; the first token counts never, since nothing predicts it.

    Raises: DataError if no row has one.
    """
    counts = np.array([sum(label != IGNORE for label in row.labels[1:]) for row in rows], dtype=np.int64)
    if not counts.sum():
        raise DataError(f"{len(rows)} documents have no token to score; each needs at least two tokens")
    return counts


def count_scored_bytes(rows: Sequence[Row]) -> Int[np.ndarray, " n"]:
    """The UTF-8 bytes of the scored text in each row."""
    return np.array([row.num_bytes for row in rows], dtype=np.int64)


def get_bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that this tokenizer puts at the start of every text, found by encoding one; None if there is none."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    adds_bos = tokenizer("a").input_ids[:1] == [bos] or tokenizer.init_kwargs.get("add_bos_token", False)
    return int(bos) if adds_bos else None


def build_text_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """A row for each text, with every token scored that another token predicts, and with at most one BOS."""
    bos = get_bos_id(tokenizer)
    return [_build_text_row(text, tokenizer, bos) for text in texts]


def _build_text_row(text: str, tokenizer: PreTrainedTokenizerBase, bos: int | None) -> Row:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids, size = list(encoded.input_ids), len(text.encode())
    if not ids:
        return Row([], [], 0)
    if bos is not None and ids[0] != bos:
        return Row([bos, *ids], [IGNORE, *ids], size, prefix_length=1)
    if tokenizer.is_fast and encoded.offset_mapping[0][0] < encoded.offset_mapping[0][1]:
        first_token_bytes = count_first_token_bytes(text, encoded.offset_mapping)
    else:  # trimmed offsets leave nothing of a token of spaces
        first_token_bytes = len(tokenizer.decode(ids[:1], clean_up_tokenization_spaces=False).encode())
    return Row(ids, [IGNORE, *ids[1:]], size - first_token_bytes, prefix_length=int(ids[0] == bos))


def count_first_token_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> int:
    """The UTF-8 bytes of the first token of `text`.

    Offsets count characters, so the bytes of a character that is split into k tokens are shared evenly among them.
    """
    stop = offsets[0][1]
    num_sharing_tokens = 1 + sum(start < stop for start, _ in offsets[1 : 1 + len(text[:stop].encode())])
    if num_sharing_tokens == 1:
        return len(text[:stop].encode())
    return len(text[: stop - 1].encode()) + max(1, len(text[stop - 1].encode()) // num_sharing_tokens)
