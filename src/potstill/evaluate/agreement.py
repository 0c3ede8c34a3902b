"""How near a student is to its teacher on the same tokens: KL(teacher || student) in nats and top-1 agreement.

The teacher reads once, whatever the number of students: `remember` keeps its last hidden states, from which its logits
are made again a chunk at a time. Both sides are cut to the ids that exist, so padded vocabularies do not matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from potstill.core.errors import UsageError, VocabularyMismatch
from potstill.core.types import Needs, Signals, supervised
from potstill.evaluate.perplexity import Scores, scored_tokens, sizes_of, surprise, tally
from potstill.evaluate.reading import Pack, Reading, Row, at_rest, context_of, packs
from potstill.models.signals import signals
from potstill.ops.divergence import forward_kl


@dataclass(frozen=True)
class Comparison:
    """A student's own scores and, for each document, its sum of KL(teacher || student) and its agreeing tokens."""

    scores: Scores
    kl: Float[np.ndarray, " n"]
    agreed: Float[np.ndarray, " n"]

    @property
    def divergence(self) -> float:
        """KL(teacher || student) in nats per token."""
        return float(self.kl.sum() / self.scores.tokens.sum())

    @property
    def agreement(self) -> float:
        """The share of tokens where both would greedily write the same one."""
        return float(self.agreed.sum() / self.scores.tokens.sum())


@dataclass(frozen=True)
class Remembered:
    """What a teacher said about `rows`: kept hidden states, or (`model` given) read again where they would not fit."""

    rows: Sequence[Row]
    reading: Reading
    scores: Scores
    packs: Sequence[Pack]
    kept: Sequence[Signals] | None
    model: PreTrainedModel | None

    def said(self, number: int) -> Signals:
        """The teacher's signals for pack `number`."""
        if self.kept is not None:
            return self.kept[number]
        assert self.model is not None
        with at_rest(self.model, dtype=self.reading.dtype):
            return _read(self.model, self.packs[number], self.reading)


def remember(
    teacher: PreTrainedModel, rows: Sequence[Row], reading: Reading | None = None, *, memory: int = 2 << 30
) -> Remembered:
    """Let `teacher` read `rows` and keep what it says, as long as that stays below `memory` bytes.

    Raises: DataError where no row has a token to score.
    """
    reading = (reading or Reading()).within(teacher)
    plan = list(packs(rows, reading, device=teacher.device))
    nll, held = np.zeros(len(rows)), 0
    kept: list[Signals] = []
    with at_rest(teacher, dtype=reading.dtype):
        for pack in plan:
            said = _read(teacher, pack, reading)
            held += said.rows.nbytes
            kept = [*kept, said] if held <= memory else []
            nll += _paid(said, pack, reading, len(rows))
    fits = held <= memory
    scores = Scores(nll, scored_tokens(rows), sizes_of(rows))
    return Remembered(rows, reading, scores, plan, kept if fits else None, None if fits else teacher)


def compare(teacher: Remembered, student: PreTrainedModel, *, vocabulary: int | None = None) -> Comparison:
    """`student` beside `teacher` on the rows that the teacher remembers, in one pass of the student.

    `vocabulary` is how many ids both share; None is what the teacher was read with.

    Raises:
        UsageError: the student's context is shorter than the windows that the teacher read.
        VocabularyMismatch: they do not speak of the same number of tokens.
    """
    reading, n = replace(teacher.reading, vocabulary=vocabulary or teacher.reading.vocabulary), len(teacher.rows)
    longest = max(int(pack.batch["position_ids"].max()) + 1 for pack in teacher.packs)
    if context_of(student) < longest:
        raise UsageError(f"the teacher read {longest} tokens at once, the student reads {context_of(student)} at most")
    nll, kl, agreed = np.zeros(n), np.zeros(n), np.zeros(n)
    with at_rest(student, dtype=reading.dtype):
        for number, pack in enumerate(teacher.packs):
            learnt = _read(student, _on(pack, student.device), reading)
            nll += _paid(learnt, pack, reading, n)
            per_row = _difference(teacher.said(number), learnt, reading=reading)
            owners = _owners(pack)
            kl += tally(owners, per_row[0], n)
            agreed += tally(owners, per_row[1], n)
    return Comparison(Scores(nll, scored_tokens(teacher.rows), sizes_of(teacher.rows)), kl, agreed)


def _difference(taught: Signals, learnt: Signals, *, reading: Reading) -> Float[Tensor, "2 N"]:
    """(KL in nats, whether the greedy tokens are the same) of every row."""
    parts = []
    for theirs, ours in zip(taught.rows.split(reading.chunk), learnt.rows.split(reading.chunk), strict=True):
        p, q = taught.logits(theirs)[:, : reading.vocabulary].float(), learnt.logits(ours).float()
        if p.shape[-1] != q.shape[-1]:
            raise VocabularyMismatch(
                f"the teacher knows {p.shape[-1]} tokens and the student {q.shape[-1]}; "
                f"KL and agreement need one tokenizer (bits per byte compare across tokenizers)"
            )
        p = p.to(q.device)
        parts.append(torch.stack([forward_kl(p, q), (p.argmax(-1) == q.argmax(-1)).float()]))
    return torch.cat(parts, dim=1)


def _read(model: PreTrainedModel, pack: Pack, reading: Reading) -> Signals:
    positions, _, _ = supervised(pack.batch)
    return signals(model, pack.batch, Needs(positions), vocabulary=reading.vocabulary)


def _paid(said: Signals, pack: Pack, reading: Reading, n: int) -> Float[np.ndarray, " n"]:
    _, targets, _ = supervised(pack.batch)
    return tally(_owners(pack), surprise(said, targets.to(said.rows.device), chunk=reading.chunk), n)


def _owners(pack: Pack) -> Tensor:
    _, _, segment = supervised(pack.batch)
    return pack.owners[segment.cpu()]


def _on(pack: Pack, device: torch.device) -> Pack:
    return Pack({name: tensor.to(device) for name, tensor in pack.batch.items()}, pack.owners)
