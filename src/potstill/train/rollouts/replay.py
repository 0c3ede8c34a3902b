"""DistiLLM's rollouts: a growing share of sampled completions, most of them replayed from a buffer."""

import math
from collections import Counter, deque
from collections.abc import Mapping
from itertools import repeat

import torch
from torch import Tensor, nn

from potstill.core.types import Batch
from potstill.data.pack_fields import split_joined_fields
from potstill.train.rollouts.base import Document, find_trainable_documents, join_documents, split_documents
from potstill.train.rollouts.on_policy import CompletionSampler

SHARE_STEP = 0.1  # the share grows by this much
LOSS_MARGIN = 0.1  # nats; the share grows when an evaluation is worse than the one before it by this much


class AdaptiveRollout:
    """Adaptive off-policy sampling with a replay buffer of `buffer_size` documents, first in first out.

    Let t be the finished part of the run. With probability phi (1 - t) a document gets a sampled completion and enters
    the buffer. With probability phi t a document of the buffer replaces it. Else it stays. phi begins at `share` and
    grows by 0.1, up to 1, whenever the loss of an evaluation is at least 0.1 above the one before. Documents of a group
    are sampled, but never replaced by others.

    Source: Ko et al., "DistiLLM" (arXiv:2402.03898), section 3.2; the numbers are those of the authors' code.
    Departs from the authors' code: there a whole batch is sampled, replayed or neither; here each document is. There an
    evaluation is compared with the last one that made phi grow, or with one before training. There nothing is replayed
    before the buffer is full. A replayed document may be longer than the one it replaces. The buffer's content depends
    on how a step is divided into passes.
    """

    def __init__(
        self, sampler: CompletionSampler, *, total_passes: int, share: float = 0.0, buffer_size: int = 1000
    ) -> None:
        self.sampler, self.total_passes = sampler, total_passes
        self.share, self.last_loss, self.num_passes_done = share, math.inf, 0
        self.buffer: deque[Document] = deque(maxlen=buffer_size)
        self.tally: Counter[str] = Counter()

    def __call__(
        self, batch: Batch, student: nn.Module, frozen: Mapping[str, nn.Module], generator: torch.Generator
    ) -> Batch:
        """The batch with some documents sampled and some replayed."""
        documents = split_documents(batch)
        noise = self.sampler.draw_noise(len(documents), generator)
        draw, is_trainable = noise[:, 0], find_trainable_documents(documents)
        fresh_probability = (
            self.share * (1 - self.num_passes_done / self.total_passes) if self.buffer else self.share
        )  # nothing can be replayed yet
        is_fresh = is_trainable & (draw < fresh_probability)
        self.num_passes_done += 1
        is_replaceable = is_trainable & ~torch.tensor([document.is_grouped for document in documents])
        for n in (is_replaceable & ~is_fresh & (draw < self.share)).nonzero()[:, 0].tolist():
            documents[n] = self.buffer[int(noise[n, 1] * len(self.buffer))]
            self.tally["replayed"] += 1
        fresh_indices = is_fresh.nonzero()[:, 0]
        fresh_documents = [documents[n] for n in fresh_indices.tolist()]
        for n, new_document in zip(
            fresh_indices.tolist(),
            self.sampler.sample_completions(fresh_documents, student, frozen, noise[fresh_indices], self.tally),
            strict=True,
        ):
            documents[n] = new_document
            self.buffer.append(new_document.drop_numbers())
        device, is_changed = batch["input_ids"].device, any(document.sampled for document in documents)
        return self.sampler.make_batch(documents, device) if is_changed else batch

    def on_evaluate(self, loss: float) -> None:
        """Grows the share if the loss of an evaluation is worse than the one before."""
        if loss >= self.last_loss + LOSS_MARGIN:
            self.share = min(1.0, self.share + SHARE_STEP)
        self.last_loss = loss

    def state_dict(self) -> dict[str, Tensor]:
        """The share, the last evaluation, the number of passes done, and the buffer."""
        return {
            "facts": torch.tensor([self.share, self.last_loss, self.num_passes_done], dtype=torch.float64),
            **join_documents(self.buffer),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        self.share, self.last_loss, num_passes_done = state["facts"].tolist()
        self.num_passes_done, lengths = int(num_passes_done), state["lengths"].tolist()
        ids, labels = (state[name].split(lengths) for name in ("input_ids", "labels"))
        self.buffer.clear()
        self.buffer.extend(map(Document, ids, labels, repeat(True), split_joined_fields(state, lengths)))
