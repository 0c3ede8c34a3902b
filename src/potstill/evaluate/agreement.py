"""Compares a student with its teacher on the same tokens: KL(teacher || student) in nats, agreement and acceptance.

The teacher runs once, whatever the number of students. `collect_teacher_outputs` keeps its last hidden states, from
which its logits are computed again a chunk at a time. Both vocabularies are cropped to the ids that exist, so a padded
vocabulary changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from potstill.core.errors import UsageError, VocabularyMismatch
from potstill.core.screen import track
from potstill.core.types import Needs, Signals, move_batch, supervised_positions
from potstill.evaluate.perplexity import Scores, compute_nll, count_scored_bytes, count_scored_tokens, sum_by_row
from potstill.evaluate.scoring_windows import Pack, Row, ScoringConfig, build_packs
from potstill.models.inference import get_max_context, inference_context
from potstill.models.signals import compute_signals
from potstill.ops.divergence import forward_kl, total_variation


@dataclass(frozen=True)
class TeacherComparison:
    """A student's scores, and for each document sums over its tokens that compare student and teacher.

    `kl` is KL(teacher || student), `top1_matches` counts equal top tokens, and `acceptance` is sum min(p, q): the
    probability that the teacher accepts a token which the student drafts at temperature 1 (arXiv:2211.17192, cor. 3.6).
    `num_tokens` are the tokens of a document that were compared. They are those of `scores` unless the student's own
    chat template, which `scores` follow, is another than the teacher's, or documents are left out. `note` says which.
    """

    scores: Scores
    kl: Float[np.ndarray, " m"]
    top1_matches: Float[np.ndarray, " m"]
    acceptance: Float[np.ndarray, " m"]
    num_tokens: Int[np.ndarray, " m"]
    note: str = ""


@dataclass(frozen=True)
class TeacherOutputs:
    """A teacher's outputs on `rows`: its stored signals or, where they do not fit in memory, the model to run again."""

    rows: Sequence[Row]
    config: ScoringConfig
    scores: Scores
    packs: Sequence[Pack]
    cached_signals: Sequence[Signals] | None
    model: PreTrainedModel | None

    def get_signals(self, index: int) -> Signals:
        """The teacher's signals for the pack at `index`."""
        if self.cached_signals is not None:
            return self.cached_signals[index]
        assert self.model is not None
        with inference_context(self.model, dtype=self.config.dtype):
            return _compute_signals(self.model, self.packs[index], self.config)


def collect_teacher_outputs(
    teacher: PreTrainedModel, rows: Sequence[Row], config: ScoringConfig | None = None, *, max_bytes: int = 2 << 30
) -> TeacherOutputs:
    """Run `teacher` on `rows` and keep its signals if they take at most `max_bytes`.

    Raises: DataError if no row has a token to score.
    """
    config = (config or ScoringConfig()).limit_to_context(teacher)
    pack_list = list(build_packs(rows, config, device=teacher.device))
    nll, num_bytes = np.zeros(len(rows)), 0
    cached_signals: list[Signals] = []
    with inference_context(teacher, dtype=config.dtype):
        for pack in track(pack_list, "teacher on held-out text"):
            outputs = _compute_signals(teacher, pack, config)
            num_bytes += outputs.rows.nbytes
            cached_signals = [*cached_signals, outputs] if num_bytes <= max_bytes else []
            nll += _sum_nll_by_row(outputs, pack, config, len(rows))
    fits_in_memory = num_bytes <= max_bytes
    scores = Scores(nll, count_scored_tokens(rows), count_scored_bytes(rows))
    return TeacherOutputs(
        rows, config, scores, pack_list, cached_signals if fits_in_memory else None, None if fits_in_memory else teacher
    )


def compare_with_teacher(
    teacher: TeacherOutputs, student: PreTrainedModel, *, vocabulary: int | None = None
) -> TeacherComparison:
    """Compare `student` with the teacher on the teacher's rows, in one pass of the student.

    `vocabulary` is the number of ids that both share; None takes the number of the teacher's `config`.

    Raises:
        UsageError: the student's context is shorter than the teacher's windows.
        VocabularyMismatch: the two have different numbers of tokens.
    """
    config, num_rows = replace(teacher.config, vocabulary=vocabulary or teacher.config.vocabulary), len(teacher.rows)
    longest_window = max(int(pack.batch["position_ids"].max()) + 1 for pack in teacher.packs)
    if get_max_context(student) < longest_window:
        raise UsageError(
            f"the teacher was run on windows of {longest_window} tokens, but the student reads at most "
            f"{get_max_context(student)}; give a smaller --context"
        )
    nll, sums = np.zeros(num_rows), np.zeros((3, num_rows))
    with inference_context(student, dtype=config.dtype):
        for index, pack in enumerate(track(teacher.packs, "model on held-out text")):
            student_signals = _compute_signals(student, _move_to_device(pack, student.device), config)
            nll += _sum_nll_by_row(student_signals, pack, config, num_rows)
            row_metrics = _compute_row_metrics(teacher.get_signals(index), student_signals, config=config)
            row_indices = _get_row_indices(pack)
            sums += np.stack([sum_by_row(row_indices, metric, num_rows) for metric in row_metrics])
    num_tokens = count_scored_tokens(teacher.rows)
    scores = Scores(nll, num_tokens, count_scored_bytes(teacher.rows))
    kl, top1_matches, acceptance = sums
    return TeacherComparison(scores, kl, top1_matches, acceptance, num_tokens)


def _compute_row_metrics(
    teacher_signals: Signals, student_signals: Signals, *, config: ScoringConfig
) -> Float[Tensor, "3 N"]:
    """(KL in nats, 1 where the likeliest tokens are equal else 0, sum min(p, q)) of every row."""
    parts = []
    for teacher_rows, student_rows in zip(
        teacher_signals.rows.split(config.chunk), student_signals.rows.split(config.chunk), strict=True
    ):
        p, q = (
            teacher_signals.logits(teacher_rows)[:, : config.vocabulary].float(),
            student_signals.logits(student_rows).float(),
        )
        if p.shape[-1] != q.shape[-1]:
            raise VocabularyMismatch(
                f"the teacher has {p.shape[-1]} tokens and the student {q.shape[-1]}; KL and agreement need one "
                f"tokenizer, bits per byte do not"
            )
        p = p.to(q.device)
        matches = (p.argmax(-1) == q.argmax(-1)).float()
        parts.append(torch.stack([forward_kl(p, q), matches, 1 - total_variation(p, q)]))
    return torch.cat(parts, dim=1)


def _compute_signals(model: PreTrainedModel, pack: Pack, config: ScoringConfig) -> Signals:
    positions, _, _ = supervised_positions(pack.batch)
    return compute_signals(model, pack.batch, Needs(positions), vocabulary=config.vocabulary)


def _sum_nll_by_row(outputs: Signals, pack: Pack, config: ScoringConfig, num_rows: int) -> Float[np.ndarray, " n"]:
    _, targets, _ = supervised_positions(pack.batch)
    return sum_by_row(
        _get_row_indices(pack), compute_nll(outputs, targets.to(outputs.rows.device), chunk=config.chunk), num_rows
    )


def _get_row_indices(pack: Pack) -> Tensor:
    _, _, segment = supervised_positions(pack.batch)
    return pack.row_indices[segment.cpu()]


def _move_to_device(pack: Pack, device: torch.device) -> Pack:
    return Pack(move_batch(pack.batch, device), pack.row_indices)
