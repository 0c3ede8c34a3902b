"""What a rollout is: it samples completions for a batch before the step that trains on it."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from potstill.core.types import IGNORE, Batch

MAX_UNPROMPTED_TOKENS = (
    2  # tokens before the first trained one that are no prompt: a BOS, and the context of a further window
)


class Document(NamedTuple):
    """A document of a batch, on the CPU; `route` says by number whose it is, of several teachers."""

    input_ids: Int[Tensor, " _"]
    labels: Int[Tensor, " _"]
    sampled: bool = False
    route: int | None = None


@runtime_checkable
class Rollout(Protocol):
    """Writes a part of a batch; `tally` counts what was written since it was last cleared."""

    @property
    def tally(self) -> Counter[str]: ...
    def __call__(
        self, batch: Batch, student: nn.Module, frozen: Mapping[str, nn.Module], generator: torch.Generator
    ) -> Batch: ...


@runtime_checkable
class StatefulRollout(Protocol):
    """A rollout with a memory, which is in the checkpoint, and that hears of each evaluation."""

    def on_evaluate(self, loss: float) -> None: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


def split_documents(batch: Batch) -> list[Document]:
    """The documents of a packed batch, in their order."""
    assert len(batch["input_ids"]) == 1, "a rollout reads packed batches"
    lengths = torch.bincount(batch["documents"][0].cpu()).tolist()
    columns = (batch[name][0].cpu().split(lengths) for name in ("input_ids", "labels"))
    split_documents = [Document(ids, labels) for ids, labels in zip(*columns, strict=True)]
    if "routes" not in batch:
        return split_documents
    routes = (int(part[0]) for part in batch["routes"][0].cpu().split(lengths))
    return [part._replace(route=route) for part, route in zip(split_documents, routes, strict=True)]


def find_trainable_documents(documents: Sequence[Document]) -> Tensor:
    """Which of the documents have a token to train on, so that there is a completion to write."""
    return torch.tensor([bool((document.labels[1:] != IGNORE).any()) for document in documents])


def count_prompt_tokens(labels: Int[Tensor, " _"], default_prompt_length: int) -> int:
    """How many tokens of a document are its prompt; at least one, and at least one is left to write."""
    first = int((labels != IGNORE).nonzero()[0])
    return first if first > MAX_UNPROMPTED_TOKENS else min(default_prompt_length, len(labels) - 1)


def make_sampled_document(prompt: Int[Tensor, " _"], tokens: Sequence[int]) -> Document:
    """The document that a prompt and a sampled completion make; only the completion is trained."""
    completion_ids = torch.tensor(tokens, dtype=prompt.dtype)
    labels = torch.cat([torch.full_like(prompt, IGNORE), completion_ids])
    return Document(torch.cat([prompt, completion_ids]), labels, sampled=True)


def count_completions(tally: Counter[str], completions: Sequence[Sequence[int]], stop_ids: frozenset[int]) -> None:
    """Counts completions, their tokens, and those that are empty or were cut."""
    tally["documents"] += len(completions)
    tally["tokens"] += sum(map(len, completions))
    tally["empty"] += sum(len(tokens) == 1 and tokens[0] in stop_ids for tokens in completions)
    tally["cut"] += sum(tokens[-1] not in stop_ids for tokens in completions)


def summarize_tally(tally: Counter[str]) -> dict[str, int]:
    """What a line of `metrics.jsonl` says of a tally: documents written and replayed, tokens, empty and cut ones."""
    return {f"rollout_{name}": tally[name] for name in ("documents", "replayed", "tokens", "empty", "cut")}


def make_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """The generator of one rank in one step, so that a resumed run draws what the first one would have drawn."""
    digest = hashlib.sha256(f"rollout {seed} {step} {rank}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
