"""The interface of a rollout, which samples completions for a batch before the step that trains on it."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from potstill.core.types import IGNORE, Batch
from potstill.data.pack_fields import get_field, join_fields, split_fields, to_tensor

MAX_UNPROMPTED_TOKENS = 2  # a BOS, and the context of a further window, are no prompt


class Document(NamedTuple):
    """A document of a batch, on the CPU. `sampled` is true if a model wrote its completion in this run.

    `fields` holds its declared fields (`data.pack_fields`): `[T]` per token, `[]` per document.
    """

    input_ids: Int[Tensor, " T"]
    labels: Int[Tensor, " T"]
    sampled: bool = False
    fields: Mapping[str, Tensor] = {}

    def drop_numbers(self) -> "Document":
        """The document without numbers that hold in its batch alone, such as that of its group."""
        fields = {name: value for name, value in self.fields.items() if not get_field(name).numbering}
        return self._replace(fields=fields)

    @property
    def is_grouped(self) -> bool:
        """Whether other documents of the batch belong to this one."""
        return any(get_field(name).numbering and int(value) >= 0 for name, value in self.fields.items())


@runtime_checkable
class Rollout(Protocol):
    """Replaces completions in a batch. `tally` counts the sampled completions and tokens since its last reset."""

    @property
    def tally(self) -> Counter[str]: ...
    def __call__(
        self, batch: Batch, student: nn.Module, frozen: Mapping[str, nn.Module], generator: torch.Generator
    ) -> Batch: ...


@runtime_checkable
class StatefulRollout(Protocol):
    """A rollout whose state is saved in the checkpoint, and that receives the loss of each evaluation."""

    def on_evaluate(self, loss: float) -> None: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


def split_documents(batch: Batch) -> list[Document]:
    """The documents of a packed batch in their order, with their declared fields."""
    assert len(batch["input_ids"]) == 1, "a rollout reads packed batches"
    lengths = torch.bincount(batch["documents"][0].cpu()).tolist()
    columns = (batch[name][0].cpu().split(lengths) for name in ("input_ids", "labels"))
    return [
        Document(ids, labels, fields=fields)
        for ids, labels, fields in zip(*columns, split_fields(batch, lengths), strict=True)
    ]


def join_documents(documents: Sequence[Document]) -> dict[str, Tensor]:
    """Documents end to end: `input_ids [T]`, `labels [T]`, `lengths [D]`, and every field that one of them has."""
    empty = torch.zeros(0, dtype=torch.long)
    lengths = [len(document.input_ids) for document in documents]
    fields = join_fields([document.fields for document in documents], lengths)
    return {
        "input_ids": torch.cat([empty, *(document.input_ids for document in documents)]),
        "labels": torch.cat([empty, *(document.labels for document in documents)]),
        "lengths": torch.tensor(lengths, dtype=torch.long),
        **{name: to_tensor(values) for name, values in fields.items()},
    }


def find_trainable_documents(documents: Sequence[Document]) -> Tensor:
    """Whether each document has a token to train on, and so a completion to sample: bool `[D]`."""
    return torch.tensor([bool((document.labels[1:] != IGNORE).any()) for document in documents])


def count_prompt_tokens(labels: Int[Tensor, " T"], default_prompt_length: int) -> int:
    """The number of tokens in a document's prompt: at least one, and at least one less than the document has."""
    first = int((labels != IGNORE).nonzero()[0])
    return first if first > MAX_UNPROMPTED_TOKENS else min(default_prompt_length, len(labels) - 1)


def make_sampled_document(document: Document, prompt_length: int, tokens: Sequence[int]) -> Document:
    """`document` with its completion replaced by sampled `tokens`; only they are trained.

    It keeps the fields. Per token, the prompt keeps its values, and the completion gets the fill value.
    """
    prompt = document.input_ids[:prompt_length]
    completion_ids = torch.tensor(tokens, dtype=prompt.dtype)
    labels = torch.cat([torch.full_like(prompt, IGNORE), completion_ids])
    fields = {}
    for name, value in document.fields.items():
        field = get_field(name)
        filled = torch.full((len(tokens),), field.fill, dtype=value.dtype)
        fields[name] = torch.cat([value[:prompt_length], filled]) if field.per == "token" else value
    return Document(torch.cat([prompt, completion_ids]), labels, sampled=True, fields=fields)


def count_completions(tally: Counter[str], completions: Sequence[Sequence[int]], stop_ids: frozenset[int]) -> None:
    """Adds to `tally` the completions, their tokens, and those that are empty or cut before a stop token."""
    tally["documents"] += len(completions)
    tally["tokens"] += sum(map(len, completions))
    tally["empty"] += sum(len(tokens) == 1 and tokens[0] in stop_ids for tokens in completions)
    tally["cut"] += sum(tokens[-1] not in stop_ids for tokens in completions)


def summarize_tally(tally: Counter[str]) -> dict[str, int]:
    """A tally as fields of `metrics.jsonl`: documents sampled and replayed, tokens, empty and cut completions."""
    return {f"rollout_{name}": tally[name] for name in ("documents", "replayed", "tokens", "empty", "cut")}


def make_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """The generator of one rank in one step. A resumed run draws the same numbers as an uninterrupted one."""
    digest = hashlib.sha256(f"rollout {seed} {step} {rank}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
