"""The types that flow through every floor: Batch, Needs, Signals, Terms and Measure.

Axes, everywhere in potstill:
B batch, T time, D model width, H heads, K key width, V value width or vocabulary, E experts, F feature width of a row
or of a feed-forward, C chunk, L layers, N rows (the positions that an objective asked for, in the order of the batch).

The keys of a `Batch` (a mapping of tensors; every layout keeps the same meaning):

| key | shape | meaning |
|---|---|---|
| `input_ids` | `[B T]` int64 | tokens |
| `labels` | `[B T]` int64 | `input_ids` where trained on, else `IGNORE`, as the first of a document is; never shifted |
| `position_ids` | `[B T]` int64 | restart at 0 with each document; this alone says where documents begin |
| `documents` | `[B T]` int64 | number of the document in this batch, -1 on padding |
| `routes` | `[B T]` int64 | which of several teachers a document is for, by number; absent: it is for all |
| `groups` | `[documents]` int64 | number of what a document belongs to (a preference pair, ...), by its number; or -1 |
| `sampled` | `[B T]` bool | whether a model wrote what is trained of this document, in this run; absent: of none |

Other fields may be declared, per token or per document (`data.pack_fields`).

What was sampled is compared with a teacher and is no truth: whatever takes labels for the truth sums over `gold` alone.

A packed batch has `B = 1` and no padding; documents lie end to end. A companion with tokens of its own reads the same
documents, numbered alike, from keys with its name before them (`teacher.input_ids`, ...): see `view`. Which rows of the
two belong together stands under `aligned.` (`data.pairs`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ALIGNED_PAIRS = (
    "aligned.pairs"  # rows of student and teacher that predict the same bytes from the same text: [2 P], ascending
)
NEXT_TOKEN_LOG_P = (
    "own_log_p"  # among the scores, [N]: the log-probability of the token that follows, where a server tells it
)
DIVISOR = "divisor"  # `divisor.NAME`: what the trainer is going to divide the term of that name by; no term does itself
EDIT_ALIGNED_PAIRS = (
    "aligned.warped"  # rows whose own tokens are paired by minimum edit distance: [2 P], the student's ascending
)
ALIGNED_GROUPS = (
    "aligned.groups",
    "aligned.teacher_groups",
)  # [N], [M]: rows whose tokens stand for one text together; or -1
IGNORE = -100  # the label of a token that is not trained on, as in torch and Hugging Face

Batch = Mapping[str, Tensor]
Weights = Mapping[str, Tensor]
Terms = Mapping[str, Tensor]  # named scalar sums over rows; nothing in it was divided by anything


def supervised_positions(batch: Batch) -> tuple[Bool[Tensor, "B T"], Int[Tensor, " N"], Int[Tensor, " N"]]:
    """(positions, targets, segment): where a next token is predicted, which token that is, and of which document.

    `positions[b, t]` holds if the token at t + 1 belongs to the same document and is trained on. The rows of every
    network for this batch come in the order of `positions`, so `targets[n]` is the label of row n.
    """
    labels, documents = batch["labels"], batch["documents"]
    positions = torch.zeros_like(labels, dtype=torch.bool)
    positions[:, :-1] = (labels[:, 1:] != IGNORE) & (documents[:, 1:] == documents[:, :-1])
    targets = labels[:, 1:][positions[:, :-1]]
    return positions, targets, documents[positions]


def gold_mask(batch: Batch) -> Bool[Tensor, " N"]:
    """Which of the supervised rows come from the data, and not from a rollout."""
    positions = supervised_positions(batch)[0]
    sampled = batch.get("sampled")
    return torch.ones_like(positions)[positions] if sampled is None else ~sampled[positions]


def get_view(batch: Batch, name: str) -> Batch:
    """The batch as the network of this name reads it: by keys of its own if there are any, else as the student does."""
    prefix = f"{name}."
    tensors = {key.removeprefix(prefix): tensor for key, tensor in batch.items() if key.startswith(prefix)}
    return tensors or {key: tensor for key, tensor in batch.items() if "." not in key}


@dataclass(frozen=True)
class Needs:
    """What an objective wants computed for one network: rows at `positions`, hidden states of `layers`, named `extras`.

    The one extra that every live model gives is `embeddings [N 2 D]`: of each row's own token and of the one after it.
    The relations are the `queries`, `keys` and `values` `[N W]` of the last attention layer, before positions.

    Needs of several objectives are united by `|`; nothing else is computed.
    """

    positions: Bool[Tensor, "B T"] | None = None
    layers: frozenset[int] = frozenset()
    relations: frozenset[str] = frozenset()
    extras: frozenset[str] = frozenset()

    def __or__(self, other: "Needs") -> "Needs":
        if self.positions is None or other.positions is None:
            positions = other.positions if self.positions is None else self.positions
        elif torch.equal(self.positions, other.positions):
            positions = self.positions
        else:
            raise ValueError("objectives over different positions cannot share one pass; give each its own view")
        return Needs(
            positions, self.layers | other.layers, self.relations | other.relations, self.extras | other.extras
        )


def select_routed_documents(batch: Batch, needs: Needs) -> tuple[Batch, Needs]:
    """Where documents have `routes`, those of a packed batch that hold a position which is asked for, and no others."""
    if "routes" not in batch or needs.positions is None:
        return batch, needs
    documents = batch["documents"][0]
    is_selected = torch.isin(documents, documents[needs.positions[0]])
    shape = batch["input_ids"].shape  # values per document are found by the documents' numbers, which stay
    return {
        name: values[:, is_selected] if values.shape == shape else values for name, values in batch.items()
    }, replace(needs, positions=needs.positions[:, is_selected])


class Head(NamedTuple):
    """The output layer of a language model: cap(scale * (rows W^T + b)), cap(z) = softcap tanh(z / softcap)."""

    weight: Float[Tensor, "V F"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, rows: Float[Tensor, "N F"]) -> Float[Tensor, "N V"]:
        """The logits of `rows`, in the dtype of `rows`."""
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        logits = torch.nn.functional.linear(rows, self.weight.to(rows.dtype), bias)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def detach(self) -> "Head":
        """The same head without gradients."""
        return self._replace(weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def crop_vocabulary(self, vocabulary: int) -> "Head":
        """The same head without the rows that pad the vocabulary to a round width."""
        if vocabulary >= len(self.weight):
            return self
        return self._replace(
            weight=self.weight[:vocabulary], bias=None if self.bias is None else self.bias[:vocabulary]
        )


@dataclass(frozen=True)
class Signals:
    """What a network says about a batch, whether it is alive, read from a cache or asked over the wire.

    `rows[n]` is the network's output at the n-th asked position and `logits(rows[a:b])` its logits there, or what a
    cache kept of the distributions (`ops.coarse.Coarse`). A live model gives its last hidden states (after the final
    norm) and its `head`, so that a fused kernel need not hold all logits.
    """

    rows: Tensor
    logits: Callable[[Tensor], Any]
    head: Head | None = None
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    relations: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class SignalSource(Protocol):
    """A frozen network that is not alive here: a cache on disk, or a teacher that is served."""

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals: ...


@runtime_checkable
class Objective(Protocol):
    """What is minimised: sum over terms of `weights[k] * terms[k] / counts[k]`, where only the trainer divides.

    `needs(batch)` names every network the objective looks at (`student`, `teacher`, ...) with what it wants of it.
    `counts(batch)` comes from the batch alone. `additive` is False only for terms that are no sums over rows.
    """

    @property
    def additive(self) -> bool: ...
    @property
    def weights(self) -> Mapping[str, float]: ...
    def needs(self, batch: Batch) -> Mapping[str, Needs]: ...
    def counts(self, batch: Batch) -> Mapping[str, int]: ...
    def __call__(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms: ...


class ParamGroup(NamedTuple):
    """How the weights of a part of an objective are trained, in an optimiser group of that `name`.

    At `rate` times the learning rate; downhill, or uphill where `sign` is -1 (a critic, against the student in one
    backward); at every `every`-th step alone.
    """

    name: str = "objective"
    rate: float = 1.0
    sign: int = 1
    interval: int = 1


@runtime_checkable
class HasParamGroup(Protocol):
    """A module whose weights, apart from those of grouped modules inside it, are trained as its `group` says."""

    @property
    def group(self) -> ParamGroup: ...


@dataclass(frozen=True)
class Measure:
    """One measured number: `value` in `unit` over `n` things, with a 95 % interval where one was computed."""

    name: str
    value: float
    unit: str
    n: int
    better: str = "lower"  # or "higher"
    low: float | None = None
    high: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, for JSON."""
        return {k: v for k, v in vars(self).items() if v not in (None, "")}
