"""The interface of a rollout, which samples completions for a batch before the step that trains on it."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from potstill.core.types import IGNORE, Batch
from potstill.data.pack_fields import OFFSETS, get_field, join_fields, split_fields, to_tensor
from potstill.ops.layout import repeat_prompts

# documents with a sampled completion, those that are replayed, and of the sampled completions: tokens, empty, cut
TALLY_NAMES = ("documents", "replayed", "tokens", "empty", "cut")
MAX_UNPROMPTED_TOKENS = 2  # a BOS, and the context of a further window, are no prompt


class Document(NamedTuple):
    """A document of a batch, on the CPU. `sampled` is true if a model wrote its completion in this run.

    `fields` holds its declared fields (`data.pack_fields`): `[T]` per token, `[]` per document. Its first
    `prefix_length` tokens are those of a prompt that other documents of the batch may share.
    """

    input_ids: Int[Tensor, " T"]
    labels: Int[Tensor, " T"]
    sampled: bool = False
    fields: Mapping[str, Tensor] = {}
    prefix_length: int = 0

    def drop_numbers(self) -> "Document":
        """The document without what holds in its batch alone: numbers, such as that of its group, and its prompt."""
        fields = {
            name: value for name, value in self.fields.items() if not get_field(name).numbering and name != OFFSETS.name
        }
        return self._replace(fields=fields, prefix_length=0)

    def drop_prefix(self) -> "Document":
        """The document from the last token of its prompt on, as a continuation."""
        start, fields = self.prefix_length, {}
        for name, value in self.fields.items():
            fields[name] = value[start:] if get_field(name).per == "token" else value
        fields[OFFSETS.name] = torch.tensor(start)
        return self._replace(
            input_ids=self.input_ids[start:], labels=self.labels[start:], fields=fields, prefix_length=0
        )

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
class StepRollout(Protocol):
    """Writes the text of all passes of a step together, where what is trained depends on the whole step.

    A step that writes is followed by `updates` - 1 steps that train on the same text. `evaluate` gives the measures of
    a student by name; `loss` is the one that falls where the student improves.
    """

    @property
    def updates(self) -> int: ...
    def roll_out(self, batches: Sequence[Batch], student: nn.Module, *, step: int) -> list[Batch]: ...
    def pop_totals(self) -> dict[str, float]: ...
    def summarize(self, totals: Mapping[str, float]) -> dict[str, float]: ...
    def evaluate(self, student: nn.Module) -> dict[str, float]: ...


@runtime_checkable
class StatefulRollout(Protocol):
    """A rollout whose state is saved in the checkpoint, and that receives the loss of each evaluation."""

    def on_evaluate(self, loss: float) -> None: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


def split_documents(batch: Batch) -> list[Document]:
    """The documents of a packed batch in their order, with their declared fields.

    Each is whole: a continuation comes with the tokens of its prompt, unlabeled. `join_documents` takes them off again.
    """
    assert len(batch["input_ids"]) == 1, "a rollout reads packed batches"
    own_lengths = torch.bincount(batch["documents"][0].cpu())
    batch = repeat_prompts(batch)
    lengths = torch.bincount(batch["documents"][0].cpu())
    columns = [batch[name][0].cpu().split(lengths.tolist()) for name in ("input_ids", "labels")]
    fields, prefix_lengths = split_fields(batch, lengths.tolist()), (lengths - own_lengths).tolist()
    return list(map(Document, *columns, repeat(False), fields, prefix_lengths))


def join_documents(documents: Sequence[Document]) -> dict[str, Tensor]:
    """Documents end to end: `input_ids [T]`, `labels [T]`, `lengths [D]`, and every field that one of them has.

    A document whose first `prefix_length` tokens are those of the last one that began at 0 is a continuation of it.
    """
    documents, empty = _share_prompts(documents), torch.zeros(0, dtype=torch.long)
    lengths = [len(document.input_ids) for document in documents]
    fields = join_fields([document.fields for document in documents], lengths)
    return {
        "input_ids": torch.cat([empty, *(document.input_ids for document in documents)]),
        "labels": torch.cat([empty, *(document.labels for document in documents)]),
        "lengths": torch.tensor(lengths, dtype=torch.long),
        **{name: to_tensor(values) for name, values in fields.items()},
    }


def _share_prompts(documents: Sequence[Document]) -> list[Document]:
    """The documents without the tokens of a prompt that stands before them; without a prompt they stay whole."""
    shared, prompt = [], torch.zeros(0, dtype=torch.long)
    for document in documents:
        size = document.prefix_length
        if 0 < size <= len(prompt) and torch.equal(prompt[:size], document.input_ids[:size]):
            shared.append(document.drop_prefix())
            continue
        shared.append(document)
        if OFFSETS.name not in document.fields or not int(document.fields[OFFSETS.name]):
            prompt = document.input_ids
    return shared


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
        fill = torch.full((len(tokens),), field.fill, dtype=value.dtype)
        fields[name] = torch.cat([value[:prompt_length], fill]) if field.per == "token" else value
    return document._replace(input_ids=torch.cat([prompt, completion_ids]), labels=labels, sampled=True, fields=fields)


def count_completions(completions: Sequence[Sequence[int]], stop_ids: frozenset[int]) -> Counter[str]:
    """The numbers of completions, of their tokens, and of those that are empty or cut before a stop token."""
    return Counter(
        documents=len(completions),
        tokens=sum(map(len, completions)),
        empty=sum(len(tokens) == 1 and tokens[0] in stop_ids for tokens in completions),
        cut=sum(tokens[-1] not in stop_ids for tokens in completions),
    )


def make_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """The generator of one rank in one step. A resumed run draws the same numbers as an uninterrupted one."""
    return seed_generator("rollout", seed, step, rank)


def seed_generator(*facts: str | int) -> torch.Generator:
    """A generator on the CPU whose numbers follow from these facts alone."""
    digest = hashlib.sha256(" ".join(map(str, facts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
