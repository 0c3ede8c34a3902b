"""DistiLLM's rollouts: more and more of the student's own text, most of it taken from a buffer."""

import math
from collections import Counter, deque
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from potstill.core.types import Batch
from potstill.train.rollout import Author, Document, documents_of, trained

STEP = 0.1  # by which the share grows
SLACK = 0.1  # nats by which an evaluation has to be worse than the one before it for the share to grow


class Adaptive:
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

    def __init__(self, author: Author, *, passes: int, share: float = 0.0, room: int = 1000) -> None:
        self.author, self.passes = author, passes
        self.share, self.before, self.done = share, math.inf, 0
        self.kept: deque[Document] = deque(maxlen=room)
        self.tally: Counter[str] = Counter()

    def __call__(
        self, batch: Batch, student: nn.Module, frozen: Mapping[str, nn.Module], generator: torch.Generator
    ) -> Batch:
        """The batch with some documents written anew and some replayed."""
        documents = documents_of(batch)
        noise = self.author.noise(len(documents), generator)
        draw, able = noise[:, 0], trained(documents)
        anew = self.share * (1 - self.done / self.passes) if self.kept else self.share  # there is nothing to replay
        fresh = able & (draw < anew)
        self.done += 1
        for n in (able & ~fresh & (draw < self.share)).nonzero()[:, 0].tolist():
            documents[n] = self.kept[int(noise[n, 1] * len(self.kept))]
            self.tally["replayed"] += 1
        chosen = fresh.nonzero()[:, 0]
        asked = [documents[n] for n in chosen.tolist()]
        for n, document in zip(
            chosen.tolist(), self.author.write(asked, student, frozen, noise[chosen], self.tally), strict=True
        ):
            documents[n] = document
            self.kept.append(document)
        device, changed = batch["input_ids"].device, any(one.sampled for one in documents)
        return self.author.laid_out(documents, device) if changed else batch

    def evaluated(self, loss: float) -> None:
        """Hears the loss of an evaluation."""
        if loss >= self.before + SLACK:
            self.share = min(1.0, self.share + STEP)
        self.before = loss

    def state_dict(self) -> dict[str, Tensor]:
        """The share, the last evaluation, the passes done, and the buffer."""
        empty = torch.zeros(0, dtype=torch.long)
        routes = [one.route for one in self.kept if one.route is not None]
        return {
            "facts": torch.tensor([self.share, self.before, self.done], dtype=torch.float64),
            "input_ids": torch.cat([empty, *(one.input_ids for one in self.kept)]),
            "labels": torch.cat([empty, *(one.labels for one in self.kept)]),
            "lengths": torch.tensor([len(one.input_ids) for one in self.kept], dtype=torch.long),
            **({"routes": torch.tensor(routes)} if routes else {}),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave."""
        self.share, self.before, done = state["facts"].tolist()
        self.done, lengths = int(done), state["lengths"].tolist()
        columns = (state[name].split(lengths) for name in ("input_ids", "labels"))
        self.kept.clear()
        routes = state["routes"].tolist() if "routes" in state else [None] * len(lengths)
        self.kept.extend(
            Document(ids, labels, True, route) for ids, labels, route in zip(*columns, routes, strict=True)
        )
