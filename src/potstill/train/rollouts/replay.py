"""DistiLLM's rollouts: more and more of the student's own text, most of it taken from a buffer."""

import math
from collections import Counter, deque
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from potstill.core.types import Batch
from potstill.train.rollouts.base import Document, find_trainable_documents, split_documents
from potstill.train.rollouts.on_policy import CompletionSampler

SHARE_STEP = 0.1  # by which the share grows
LOSS_MARGIN = 0.1  # nats by which an evaluation has to be worse than the one before it for the share to grow


class AdaptiveRollout:
    """Adaptive off-policy use of student-generated text, with a replay buffer of `room` documents, first in first out.

    A document is written anew with chance phi (1 - t), t being the part of the run that is over, and goes into the
    buffer; with chance phi t it is replaced by one of the buffer, and else left as it is. phi begins at `share` and
    grows by 0.1, up to 1, whenever the loss of an evaluation is at least 0.1 above that of the one before.

    Source: Ko et al., "DistiLLM" (arXiv:2402.03898), section 3.2; the numbers are those of the authors' code.
    Departs from the authors' code: there a whole batch is either, here each document is; there an evaluation is
    compared with the last that made phi grow, or with one before training; there nothing is replayed before the buffer
    is full. What is replayed may be longer than what it replaces, and what is in the buffer depends on how a step is
    cut into passes.
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
        """The batch with some documents written anew and some replayed."""
        documents = split_documents(batch)
        noise = self.sampler.draw_noise(len(documents), generator)
        draw, is_trainable = noise[:, 0], find_trainable_documents(documents)
        fresh_probability = (
            self.share * (1 - self.num_passes_done / self.total_passes) if self.buffer else self.share
        )  # there is nothing to replay
        is_fresh = is_trainable & (draw < fresh_probability)
        self.num_passes_done += 1
        for n in (is_trainable & ~is_fresh & (draw < self.share)).nonzero()[:, 0].tolist():
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
            self.buffer.append(new_document)
        device, is_changed = batch["input_ids"].device, any(document.sampled for document in documents)
        return self.sampler.make_batch(documents, device) if is_changed else batch

    def on_evaluate(self, loss: float) -> None:
        """Hears the loss of an evaluation."""
        if loss >= self.last_loss + LOSS_MARGIN:
            self.share = min(1.0, self.share + SHARE_STEP)
        self.last_loss = loss

    def state_dict(self) -> dict[str, Tensor]:
        """The share, the last evaluation, the passes done, and the buffer."""
        empty = torch.zeros(0, dtype=torch.long)
        routes = [document.route for document in self.buffer if document.route is not None]
        return {
            "facts": torch.tensor([self.share, self.last_loss, self.num_passes_done], dtype=torch.float64),
            "input_ids": torch.cat([empty, *(document.input_ids for document in self.buffer)]),
            "labels": torch.cat([empty, *(document.labels for document in self.buffer)]),
            "lengths": torch.tensor([len(document.input_ids) for document in self.buffer], dtype=torch.long),
            **({"routes": torch.tensor(routes)} if routes else {}),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave."""
        self.share, self.last_loss, num_passes_done = state["facts"].tolist()
        self.num_passes_done, lengths = int(num_passes_done), state["lengths"].tolist()
        columns = (state[name].split(lengths) for name in ("input_ids", "labels"))
        self.buffer.clear()
        routes = state["routes"].tolist() if "routes" in state else [None] * len(lengths)
        self.buffer.extend(
            Document(ids, labels, True, route) for ids, labels, route in zip(*columns, routes, strict=True)
        )
