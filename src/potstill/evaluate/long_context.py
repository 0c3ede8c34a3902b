"""How a model uses a long context: bits per byte by position, and the needle probe.

    bits per byte of [a, b) = sum over a <= t < b of -ln p(x_t | x_<t) / (ln 2 * UTF-8 bytes of the tokens t)

Windows are cut end to end from long documents, so that each range of positions holds text of the same documents. The
values fall with t where a model uses its context, and rise where it cannot read that far.

The needle probe hides "The password of NAME is VALUE." at a share `depth` of a text. The text ends with "The password
of NAME is". A hit is a model that gives VALUE a higher log-probability than the seven other values. A guess is right in
one of eight trials. No answer is generated, so base models and tiny models can be measured.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import DataError, UnsupportedModel, UsageError
from potstill.core.screen import track
from potstill.core.types import Batch, Needs, supervised_positions
from potstill.evaluate.bootstrap import bootstrap_interval
from potstill.evaluate.perplexity import compute_nll
from potstill.evaluate.scoring_windows import ScoringConfig
from potstill.models.inference import inference_context
from potstill.models.signals import compute_signals
from potstill.models.tokenizers.token_bytes import read_token_bytes

MAX_RANGES, MIN_RANGE = 6, 32  # ranges of positions, and tokens in the first one
NUM_LENGTHS = 4  # of texts with a needle; each is half of the next
NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry")
VALUES = ("apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer")
NEEDLE, QUESTION = "\nThe password of {name} is {value}.\n", "\nThe password of {name} is"


@dataclass(frozen=True)
class PositionScores:
    """For each window and range of positions the negative log-likelihood in nats, and the bytes of its tokens."""

    edges: tuple[int, ...]
    nll: Float[np.ndarray, "n ranges"]
    num_bytes: Int[np.ndarray, "n ranges"]

    def to_rows(self) -> list[dict[str, Any]]:
        """`start`, `stop`, `bits_per_byte` and its 95 % interval over the windows, of each range."""
        intervals = (
            bootstrap_interval(nll / np.log(2), num_bytes.astype(float))
            for nll, num_bytes in zip(self.nll.T, self.num_bytes.T, strict=True)
        )
        return [
            {"start": start, "stop": stop, "bits_per_byte": value}
            | ({"low": low, "high": high} if len(self.nll) > 1 else {})
            for start, stop, (value, low, high) in zip(self.edges, self.edges[1:], intervals, strict=False)
        ]


def make_edges(tokens: int) -> tuple[int, ...]:
    """The bounds of the ranges: 0, then `tokens` halved at most five times: 0, 128, 256, 512, 1024, 2048, 4096."""
    edges = [tokens]
    while len(edges) < MAX_RANGES and edges[-1] // 2 >= MIN_RANGE:
        edges.append(edges[-1] // 2)
    return (0, *reversed(edges))


def cut_long_windows(
    documents: Iterable[Sequence[int]], tokens: int, *, limit: int, bos: int | None = None
) -> list[list[int]]:
    """At most `limit` windows of `tokens` tokens, the first of each document, then the second of each.

    With `bos` each window begins with it.

    Raises:
        DataError: no document is long enough.
    """
    prefix = [] if bos is None else [bos]
    size = tokens - len(prefix)
    bodies = [list(ids[1:] if prefix and list(ids[:1]) == prefix else ids) for ids in documents]
    columns = [[prefix + ids[i : i + size] for i in range(0, len(ids) - size + 1, size)] for ids in bodies]
    windows = [window for row in zip_longest(*columns) for window in row if window is not None]
    if not windows:
        raise DataError(
            f"no document that is measured has {tokens} tokens; the longest has {max(map(len, bodies), default=0)}: "
            f"give other --data, or --split all"
        )
    return windows[:limit]


def score_by_position(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Sequence[int]],
    config: ScoringConfig | None = None,
) -> PositionScores:
    """The scores of `model` on windows of one length, each read in one pass. A model's own context limits nothing.

    Raises:
        UnsupportedModel: the tokenizer does not tell the bytes of its tokens.
    """
    config, size = config or ScoringConfig(), len(windows[0])
    edges = make_edges(size)
    token_bytes = np.array([len(text) for text in read_token_bytes(tokenizer).by_id])
    ranges = np.searchsorted(edges, np.arange(1, size), side="right") - 1
    nll, num_bytes = (np.zeros((len(windows), len(edges) - 1)) for _ in range(2))
    with inference_context(model, dtype=config.dtype):
        for number, ids in enumerate(track(windows, "long windows")):
            batch = _make_batch(ids, model.device)
            positions, targets, _ = supervised_positions(batch)
            outputs = compute_signals(model, batch, Needs(positions), vocabulary=config.vocabulary)
            values = compute_nll(outputs, targets, chunk=config.chunk).double().cpu().numpy()
            nll[number] = np.bincount(ranges, weights=values, minlength=len(edges) - 1)
            num_bytes[number] = np.bincount(ranges, weights=token_bytes[list(ids[1:])], minlength=len(edges) - 1)
    return PositionScores(edges, nll, num_bytes.astype(np.int64))


class NeedleCell(NamedTuple):
    """The hits of all trials with texts of `length` tokens that hold the needle at a share `depth` of them."""

    length: int
    depth: float
    hits: tuple[bool, ...]

    def to_dict(self) -> dict[str, Any]:
        """`length`, `depth`, `accuracy` and the number of trials `n`."""
        return {
            "length": self.length,
            "depth": self.depth,
            "accuracy": sum(self.hits) / len(self.hits),
            "n": len(self.hits),
        }


@dataclass(frozen=True, kw_only=True)
class NeedleConfig:
    """The longest text in tokens, the depths of the needle, and the trials of each length and depth.

    A trial has the same text, name and value at all depths. Values take turns, so that a model that always names one
    of them is right in one of eight trials.
    """

    tokens: int
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 8
    seed: int = 1

    @property
    def lengths(self) -> tuple[int, ...]:
        """`tokens`, halved at most three times."""
        return tuple(self.tokens >> n for n in reversed(range(NUM_LENGTHS)))


class LongContext(NamedTuple):
    """The scores by position and the cells of the needle probe, of those that were measured."""

    positions: PositionScores | None = None
    needle: tuple[NeedleCell, ...] = ()


def probe_needle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    filler: Sequence[int],
    config: NeedleConfig,
    scoring: ScoringConfig | None = None,
    *,
    bos: int | None = None,
) -> tuple[NeedleCell, ...]:
    """The hits at every length that has room for the needle, and at every depth; `filler` is the text around it.

    A filler shorter than a text is repeated. A model's own context limits nothing.

    Raises:
        DataError: the filler is empty.
        UsageError: no length has room for the needle.
        UnsupportedModel: the tokenizer begins two values with the same token.
    """
    scoring, filler_ids = scoring or ScoringConfig(), np.asarray(filler)
    if not len(filler_ids):
        raise DataError("there is no text to hide a needle in; give other --data")
    needles = {(name, value): tokenize_needle(tokenizer, name, value) for name in NAMES for value in VALUES}
    room_needed = max(2 * len(needle) + len(question) for needle, question, _ in needles.values()) + 1
    lengths = [length for length in config.lengths if length >= room_needed]
    if not lengths:
        raise UsageError(f"a text of {config.tokens} tokens is too short for a needle; give at least {room_needed}")
    hits: dict[tuple[int, float], list[bool]] = {}
    trials = [(length, trial) for length in lengths for trial in range(config.trials)]
    with inference_context(model, dtype=scoring.dtype):
        for length, trial in track(trials, "needle probe"):
            rng = np.random.default_rng((config.seed, length, trial))
            name, value = NAMES[rng.integers(len(NAMES))], trial % len(VALUES)
            needle, question, candidates = needles[name, VALUES[value]]
            prefix = [] if bos is None else [bos]
            room = length - len(prefix) - len(needle) - len(question)
            text = np.take(filler_ids, np.arange(room) + rng.integers(len(filler_ids)), mode="wrap").tolist()
            for depth in config.depths:
                cut = round(depth * room)
                ids = [*prefix, *text[:cut], *needle, *text[cut:], *question]
                logits = _compute_last_logits(model, ids, scoring)
                hits.setdefault((length, depth), []).append(int(logits[candidates].argmax()) == value)
    return tuple(NeedleCell(length, depth, tuple(values)) for (length, depth), values in hits.items())


def tokenize_needle(
    tokenizer: PreTrainedTokenizerBase, name: str, value: str
) -> tuple[list[int], list[int], list[int]]:
    """The ids of the needle, those of the question up to where the values differ, and the next id of each value.

    Raises:
        UnsupportedModel: two values have the same next id.
    """
    needle, *answers = (
        list(tokenizer(text, add_special_tokens=False).input_ids)
        for text in (
            NEEDLE.format(name=name, value=value),
            *(f"{QUESTION} {value}".format(name=name) for value in VALUES),
        )
    )
    size = next((i for i, ids in enumerate(zip(*answers, strict=False)) if len(set(ids)) > 1), 0)
    candidates = [ids[size] for ids in answers]
    if len(set(candidates)) < len(VALUES):
        raise UnsupportedModel("the tokenizer begins two words of the needle probe alike, so it cannot be measured")
    return needle, answers[0][:size], candidates


def _make_batch(ids: Sequence[int], device: torch.device) -> Batch:
    row = torch.tensor([list(ids)], device=device)
    positions = torch.arange(len(ids), device=device)[None]
    return {"input_ids": row, "labels": row, "position_ids": positions, "documents": torch.zeros_like(row)}


def _compute_last_logits(model: PreTrainedModel, ids: Sequence[int], config: ScoringConfig) -> Float[Tensor, " V"]:
    """The logits of the token after `ids`."""
    batch = _make_batch(ids, model.device)
    positions = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    positions[0, -1] = True
    outputs = compute_signals(model, batch, Needs(positions), vocabulary=config.vocabulary)
    return outputs.logits(outputs.rows)[0].float().cpu()
