"""The types that every floor shares: Batch, Needs, Signals and Terms.

Axes, everywhere in potstill:
B batch, T time, D model width, H heads, K key width, V value width or vocabulary, E experts, F feature width of a row
or of a feed-forward, C chunk, L layers, N rows (the positions that an objective needs, in the order of the batch).

The keys of a `Batch` (a mapping of tensors; every layout keeps the same meaning):

| key | shape | meaning |
|---|---|---|
| `input_ids` | `[B T]` int64 | tokens |
| `labels` | `[B T]` int64 | `input_ids` of trained tokens, else `IGNORE`, also at a document's start; never shifted |
| `targets` | `[B T]` int64 | optional: the target *at this position* (masked word, tag, class), else `IGNORE` |
| `position_ids` | `[B T]` int64 | restart with each document, at 0 or at its offset; only they mark where it begins |
| `documents` | `[B T]` int64 | number of the document in this batch, -1 on padding |
| `routes` | `[B T]` int64 | optional: number of the one teacher that a document is for, of several |
| `groups` | `[documents]` int64 | optional: number of the group of a document (a preference pair, ...), or -1 |
| `sides` | `[documents]` int64 | optional: `CHOSEN`, `REJECTED`, `BASELINE`, or -1 (a shared prompt, any other text) |
| `offsets` | `[documents]` int64 | optional: position of a document's first token; above 0 it is a continuation |
| `pairs` | `[2 P]` int64 | optional: documents of the `CHOSEN` and the `REJECTED` side of each pair, ascending |
| `rows` | `[documents]` int64 | optional: number of the row of a prompt in its data set, or -1 |
| `advantages` | `[documents]` float32 | optional: advantage of a sample over the others of its group |
| `sampling_log_p` | `[B T]` float32 | optional: log-probability of a sampled token, as its decoder computed it |
| `old_log_p` | `[B T]` float32 | optional: the same by the policy before the first of several updates |
| `sampled` | `[B T]` bool | optional: whether a model wrote the trained tokens of this document in this run |

Other fields may be declared, per token or per document (`data.pack_fields`).

Without `targets` a position predicts the next token. Sampled tokens are not ground truth; only a teacher scores them.
An objective that treats labels as the truth sums over `gold_mask` only.

A *continuation* is a document whose first token has a position p > 0. It sees the first p tokens of the last document
that began at 0, as if they were its own. So the answers of one prompt share it: the prompt without its last token is a
document without labels, and each answer is a continuation that begins with the prompt's last token, at its own position
p, without a label. They lie in one row, in one group. A continuation without a document before it sees itself alone.

A packed batch has `B = 1` and no padding; documents lie end to end. A network with another tokenizer reads the same
documents, with the same numbers, from keys with its name as prefix (`teacher.input_ids`, ...): see `get_view`. The
encoder of an encoder-decoder reads the keys `source.input_ids`, `source.position_ids` and `source.documents`; its
decoder reads `input_ids`. Keys under `aligned.` pair rows of student and teacher (`data.cross_tokenizer.packs`). The
trainer adds `run.step []`, the number of the optimizer step; an objective that draws random numbers draws them by it.
With `--neftune` it also adds `noise.keys` and `noise.scales` `[B T]`, the noise of the student's input embeddings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from potstill.core.errors import UnsupportedModel

ALIGNED_PAIRS = (
    "aligned.pairs"  # rows of student and teacher that predict the same bytes from the same text: [2 P], ascending
)
NEXT_TOKEN_LOG_P = "own_log_p"  # in `Signals.scores`, [N]: log p(next token), where a server gives it
DIVISOR = "divisor"  # `divisor.NAME`: the trainer divides the term of that name by it; terms never divide
EDIT_ALIGNED_PAIRS = (
    "aligned.warped"  # rows whose own tokens are paired by minimum edit distance: [2 P], the student's ascending
)
ALIGNED_GROUPS = (
    "aligned.groups",
    "aligned.teacher_groups",
)  # [N], [M]: the number of the run of tokens with the same bytes that a row belongs to, or -1
STEP = "run.step"  # the number of the optimizer step, in training alone
MAX_TOKENS = "run.max_tokens"  # the most tokens that a sample of this run may have, where there are samples
ROWS, ADVANTAGES = "rows", "advantages"
SAMPLING_LOG_P, OLD_LOG_P = "sampling_log_p", "old_log_p"
NOISE_KEYS, NOISE_SCALES = "noise.keys", "noise.scales"  # of each token (`ops.embedding_noise`), in training alone
SOURCE = "source"  # `source.NAME`: an input of the encoder of an encoder-decoder
REFERENCE, PLUS, MINUS = "reference", "plus", "minus"  # frozen networks of an alignment, by name
IGNORE = -100  # the label of a token that is not trained on, as in torch and Hugging Face
CHOSEN, REJECTED = 0, 1  # in `sides`: the side of a pair; of a labeled answer: desirable, undesirable
BASELINE = 2  # in `sides`: a prompt with the answer of another one (KTO), for log-probabilities without gradient

Batch = Mapping[str, Tensor]
Weights = Mapping[str, Tensor]
Terms = Mapping[str, Tensor]  # named scalar sums over rows, undivided


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """The batch with all of its tensors on `device`."""
    return {name: values.to(device) for name, values in batch.items()}


def supervised_positions(batch: Batch) -> tuple[Bool[Tensor, "B T"], Int[Tensor, " N"], Int[Tensor, " N"]]:
    """(positions, targets, documents) of all predictions: where, of which token or class, and in which document.

    With `targets` in the batch these are the positions with a target other than `IGNORE`; else those of the next token.
    Every network gives its rows for this batch in the order of `positions`, so `targets[n]` is the target of row n.
    """
    if "targets" not in batch:
        return next_token_positions(batch)
    positions = batch["targets"] != IGNORE
    return positions, batch["targets"][positions], batch["documents"][positions]


def next_token_positions(batch: Batch) -> tuple[Bool[Tensor, "B T"], Int[Tensor, " N"], Int[Tensor, " N"]]:
    """(positions, targets, documents) of the next tokens, whether or not the batch has other targets.

    `positions[b, t]` is True if the token at t + 1 belongs to the same document and is trained.
    """
    labels, documents = batch["labels"], batch["documents"]
    positions = torch.zeros_like(labels, dtype=torch.bool)
    positions[:, :-1] = (labels[:, 1:] != IGNORE) & (documents[:, 1:] == documents[:, :-1])
    targets = labels[:, 1:][positions[:, :-1]]
    return positions, targets, documents[positions]


def gold_mask(batch: Batch) -> Bool[Tensor, " N"]:
    """True at the supervised rows that come from the data, False at those from a rollout."""
    positions = supervised_positions(batch)[0]
    sampled = batch.get("sampled")
    return torch.ones_like(positions)[positions] if sampled is None else ~sampled[positions]


def get_view(batch: Batch, name: str) -> Batch:
    """The batch of the network `name`: the tensors under its own keys if there are any, else the student's."""
    prefix = f"{name}."
    tensors = {key.removeprefix(prefix): tensor for key, tensor in batch.items() if key.startswith(prefix)}
    return tensors or {key: tensor for key, tensor in batch.items() if "." not in key or key.startswith(f"{SOURCE}.")}


@dataclass(frozen=True)
class Needs:
    """What an objective needs of one network: rows at `positions`, hidden states of `layers`, named `extras`.

    Every model gives the extra `embeddings [N 2 D]`: of each row's own token and of the next token. The relations are
    the `queries`, `keys` and `values` `[N W]` of the last attention layer, before positions.

    `|` unites the needs of several objectives, positions included; networks compute nothing else. `Signals.select_rows`
    then gives each objective the rows at its own positions.
    """

    positions: Bool[Tensor, "B T"] | None = None
    layers: frozenset[int] = frozenset()
    relations: frozenset[str] = frozenset()
    extras: frozenset[str] = frozenset()

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            _unite_positions(self.positions, other.positions),
            self.layers | other.layers,
            self.relations | other.relations,
            self.extras | other.extras,
        )


def _unite_positions(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None or a is b:
        return b if a is None else a
    return a | b


def select_routed_documents(batch: Batch, needs: Needs) -> tuple[Batch, Needs]:
    """The documents of a packed batch with `routes` that contain a needed position; any other batch unchanged.

    A continuation comes with its prompt.
    """
    return (batch, needs) if "routes" not in batch else select_needed_documents(batch, needs)


def select_needed_documents(batch: Batch, needs: Needs) -> tuple[Batch, Needs]:
    """The documents of a packed batch that contain a needed position, and the prompts of those among them that continue
    one."""
    if needs.positions is None:
        return batch, needs
    documents = batch["documents"][0]
    prompt_starts = torch.where(batch["position_ids"][0] == 0, torch.arange(len(documents)).to(documents), -1)
    last_starts = prompt_starts.cummax(0).values
    prompts = torch.where(last_starts >= 0, documents[last_starts.clamp(min=0)], documents)
    numbers = torch.cat([documents[needs.positions[0]], prompts[needs.positions[0]]])
    shape = batch["input_ids"].shape  # values per document are found by the documents' numbers, which stay
    is_selected = torch.isin(documents, numbers)
    selected = {name: values[:, is_selected] if values.shape == shape else values for name, values in batch.items()}
    if f"{SOURCE}.documents" in batch:
        in_source = torch.isin(batch[f"{SOURCE}.documents"][0], numbers)
        names = [name for name in batch if name.startswith(f"{SOURCE}.")]
        selected |= {name: batch[name][:, in_source] for name in names}
    return selected, replace(needs, positions=needs.positions[:, is_selected])


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

    def select(self, token_ids: Int[Tensor, " S"]) -> "Head":
        """The head of these tokens alone, in this order: a copy of their rows."""
        bias = None if self.bias is None else self.bias[token_ids]
        return self._replace(weight=self.weight[token_ids], bias=bias)


@dataclass(frozen=True)
class Signals:
    """The answer of a network (a model here, a cache or a server) for a batch.

    `rows[n]` is the input of the output layer at the n-th needed position. `logits(rows[a:b])` are the logits there, or
    the partial distributions of a cache (`ops.coarse.CoarseDistribution`). A causal language model's rows are its last
    hidden states, after the final norm; with its `head` a fused kernel does not need all logits in memory. Every other
    field has the same rows.
    """

    rows: Tensor
    logits: Callable[[Tensor], Any]
    head: Head | None = None
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    relations: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def select_rows(self, is_selected: Bool[Tensor, " N"]) -> "Signals":
        """The signals at some of the rows."""
        parts: dict[str, Any] = {
            name: {key: values[is_selected] for key, values in getattr(self, name).items()}
            for name in ("layers", "relations", "scores", "extras")
        }
        return replace(self, rows=self.rows[is_selected], **parts)


def select_needed_rows(signals: Signals, united: Needs, needs: Needs) -> Signals:
    """The rows of one objective's `needs`, from signals that were computed for the `united` needs of several."""
    if united.positions is None or needs.positions is None or torch.equal(united.positions, needs.positions):
        return signals
    return signals.select_rows(needs.positions[united.positions])


def select_supervised_rows(signals: Signals, batch: Batch, needs: Needs) -> Signals:
    """The rows at the needed positions, from signals at all supervised positions, which caches and servers give.

    Raises: UnsupportedModel for a position that is not supervised.
    """
    positions = supervised_positions(batch)[0]
    if needs.positions is not None and bool((needs.positions & ~positions).any()):
        raise UnsupportedModel("caches and servers give trained tokens only; the objective needs a loaded teacher")
    return select_needed_rows(signals, Needs(positions), needs)


@runtime_checkable
class SignalSource(Protocol):
    """A network that gives its signals itself: a cache, a served teacher, or a task model."""

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals: ...


@runtime_checkable
class Objective(Protocol):
    """A loss to minimize: sum over terms of `weights[k] * terms[k] / counts[k]`. Only the trainer divides.

    `needs(batch)` maps the name of each network (`student`, `teacher`, ...) to the needs of the objective.
    `counts(batch)` depends on the batch alone. `additive` is False only for terms that are not sums over rows.
    """

    @property
    def additive(self) -> bool: ...
    @property
    def weights(self) -> Mapping[str, float]: ...
    def needs(self, batch: Batch) -> Mapping[str, Needs]: ...
    def counts(self, batch: Batch) -> Mapping[str, int]: ...
    def __call__(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms: ...


class ParamGroup(NamedTuple):
    """The optimizer group `name` for the weights of a part of an objective.

    `rate` multiplies the learning rate. With `sign` -1 these weights maximize the loss (a critic, against the student
    in one backward pass). The optimizer updates them at every `interval`-th step.
    """

    name: str = "objective"
    rate: float = 1.0
    sign: int = 1
    interval: int = 1


@runtime_checkable
class HasParamGroup(Protocol):
    """A module that sets the optimizer group of its weights; modules inside it may have other groups."""

    @property
    def group(self) -> ParamGroup: ...
