"""The checks of a pair with two tokenizers: each model on its own tokens, and the alignment between the two.

Each model has its own `CheckInputs` with the cross-entropy of the text in its own tokens. The checks here compare both:
is the text the same, and do aligned tokens represent the same bytes? They join the bytes of the tokens and do not use
the spans from which the alignment was computed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from potstill.core.types import ALIGNED_GROUPS, ALIGNED_PAIRS, Batch, supervised_positions
from potstill.data.cross_tokenizer.packs import TokenizerInfo, translate_windows
from potstill.data.cross_tokenizer.token_spans import locate_tokens
from potstill.objectives.cross_entropy import CROSS_ENTROPY
from potstill.stages.checks.byte_text import (
    abbreviate,
    is_contained,
    is_same_bytes,
    join_groups,
    strip_untrained,
    supervised_text,
    target_bytes,
)
from potstill.stages.checks.inputs import MAX_SAMPLED, CrossTokenizerInputs
from potstill.stages.checks.perturbation import check_finite_differences, check_packing_isolation
from potstill.stages.checks.report import FAIL, NOTE, PASS, Check, Invariant, relative_difference, run_checks
from potstill.stages.checks.same_tokenizer import (
    check_gradient_accumulation,
    check_label_mask,
    check_lm_head_reproduced,
    check_loss_matches_reference,
    check_repeatability,
)
from potstill.stages.checks.stopping import check_stop_token

MIN_ALIGNED_SHARE = 0.9  # a smaller share of aligned tokens gets a note
MIN_STOP_SHARE = 0.5  # the least share of answers that the teacher ends too
MIN_SAME_TEXT_SHARE = 0.9  # the least share of documents with the same text for both


CrossTokenizerCheck = Callable[[CrossTokenizerInputs], Check | None]


def run_cross_tokenizer_checks(inputs: CrossTokenizerInputs, *, quick: bool = False) -> Iterator[Check]:
    """Every check of a pair with two tokenizers: those that compare both models, then those of each model alone."""
    yield from run_checks(inputs, QUICK_PAIR_CHECKS if quick else PAIR_CHECKS)
    student_checks = [*MODEL_CHECKS, check_stop_token, *(() if quick else STUDENT_CHECKS)]
    for model_inputs, checks in ((inputs.student, student_checks), (inputs.teacher, MODEL_CHECKS)):
        for check in run_checks(model_inputs, checks):
            yield replace(check, name=f"{check.name} ({model_inputs.role})")


def check_same_text(inputs: CrossTokenizerInputs) -> Check:
    """The teacher reads the same text as the student, byte for byte."""
    texts = [supervised_text(batch, reader) for batch, reader in inputs.model_views]
    mismatches = [pair for pair in zip(*texts, strict=True) if not is_contained(*pair)]
    same_share = 1 - len(mismatches) / len(texts[0])
    example = "".join(f"; {abbreviate(a)} is {abbreviate(b)} for the teacher" for a, b in mismatches[:1])
    passed = same_share >= MIN_SAME_TEXT_SHARE
    return Check(
        name="same text",
        outcome=FAIL if not passed else NOTE if mismatches else PASS,
        found=f"in {same_share:.1%} of {len(texts[0])} documents{example}",
        why="a teacher whose tokenizer rewrites the text gives signals for another text",
        remedy="" if passed else "choose a teacher whose tokenizer keeps the text, with its letter case and spaces",
    )


def check_aligned_tokens(inputs: CrossTokenizerInputs) -> Check:
    """The share of the student's trained tokens that are aligned with a token of the teacher."""
    is_sufficient = inputs.aligned_share >= MIN_ALIGNED_SHARE
    caveat = "" if is_sufficient else "; at the others an objective at aligned tokens learns nothing from the teacher"
    return Check(
        name="aligned tokens",
        outcome=PASS if is_sufficient else NOTE,
        found=f"{inputs.aligned_share:.1%} of the trained tokens{caveat}",
        why="both predict the same bytes at aligned tokens only",
    )


def check_aligned_bytes(inputs: CrossTokenizerInputs) -> Check:
    """Aligned tokens, and aligned runs of them, represent the same bytes of the same document."""
    (student_batch, student_reader), (teacher_batch, teacher_reader) = inputs.model_views
    student_bytes, teacher_bytes = (
        target_bytes(student_batch, student_reader),
        target_bytes(teacher_batch, teacher_reader),
    )
    token_pairs = [(student_bytes[a], teacher_bytes[b]) for a, b in inputs.full_packs[ALIGNED_PAIRS].T.tolist()]
    groups = [
        join_groups(row_bytes, inputs.full_packs[key].tolist())
        for row_bytes, key in zip((student_bytes, teacher_bytes), ALIGNED_GROUPS, strict=True)
    ]
    group_pairs = [
        (groups[0].get(number, b""), groups[1].get(number, b""))
        for number in sorted(groups[0].keys() | groups[1].keys())
    ]
    documents = [
        supervised_positions(batch)[2][rows]
        for batch, rows in zip((student_batch, teacher_batch), inputs.full_packs[ALIGNED_PAIRS], strict=True)
    ]
    mismatches = [pair for pair in token_pairs + group_pairs if not is_same_bytes(*pair)]
    passed = not mismatches and torch.equal(*documents)
    counts_text = f"{len(token_pairs):,} tokens and {len(group_pairs):,} runs of them"
    example = f", such as {mismatches[0][0]!r} and {mismatches[0][1]!r}" if mismatches else ""
    return Check.from_result(
        "aligned bytes",
        passed,
        finding=counts_text if passed else f"{len(mismatches):,} of {counts_text} are not{example}",
        why="a misaligned row learns another token's distribution without an error",
    )


def check_self_alignment(inputs: CrossTokenizerInputs) -> Check | None:
    """When a tokenizer is aligned with itself, every token is paired with itself."""
    counts_by_text = [
        _count_misaligned(strip_untrained(text), reader)
        for batch, reader in inputs.model_views
        for text in supervised_text(batch, reader)[:MAX_SAMPLED]
    ]
    num_misaligned, num_tokens = (sum(counts) for counts in zip(*counts_by_text, strict=True))
    if not num_tokens:
        return None
    return Check.from_result(
        "self alignment",
        not num_misaligned,
        finding=f"all {num_tokens:,} tokens"
        if not num_misaligned
        else f"{num_misaligned:,} of {num_tokens:,} tokens are not",
        why="this finds an alignment that is off by one, whatever the other tokenizer is",
    )


def _count_misaligned(text: str, reader: TokenizerInfo) -> tuple[int, int]:
    """(tokens of `text` that are not aligned with themselves, tokens of `text` with bytes).

    (0, 0) for a text that does not survive decoding: with a space added in front, or rewritten, its tokens differ.
    """
    ids = locate_tokens([text], reader.tokenizer, reader.pieces, add_special_tokens=False)[0].ids
    if not len(ids):
        return 0, 0
    plain_reader = reader._replace(chat_markers=None)
    (translation,) = translate_windows([(ids, ids)], plain_reader, plain_reader)
    offset = len(translation.input_ids) - len(ids)
    if offset < 0 or not torch.equal(translation.input_ids[offset:], ids):
        return 0, 0
    token_bytes = [b"" if i in reader.pieces.special_ids else reader.pieces.by_id[i] for i in ids.tolist()]
    if reader.adds_dummy_prefix and token_bytes[0] == b" ":
        token_bytes[0] = b""  # the tokenizer adds it; the text does not hold it
    expected = [position for position, piece in enumerate(token_bytes) if piece]
    return len(
        {(position, position + offset) for position in expected} - set(map(tuple, translation.equal_tokens.tolist()))
    ), len(expected)


def check_teacher_stop_token(inputs: CrossTokenizerInputs) -> Check | None:
    """The teacher ends answers where the student is trained to end them."""
    if inputs.teacher.kind == "text":
        return None
    passed, has_cross_entropy = inputs.teacher.stop_share >= MIN_STOP_SHARE, CROSS_ENTROPY in inputs.module.term_names
    caveat = "" if passed or not has_cross_entropy else "; at the others cross-entropy alone teaches it"
    return Check(
        name="teacher stop token",
        outcome=PASS if passed else NOTE if has_cross_entropy else FAIL,
        found=f"in {inputs.teacher.stop_share:.0%} of the answers{caveat}",
        why="a student that never learns to stop writes on without end",
        remedy=""
        if passed or has_cross_entropy
        else "choose a teacher with an end-of-text token, or a --cross-entropy above 0",
    )


def check_deterministic_teacher(inputs: CrossTokenizerInputs) -> Check:
    """The objective gives the same sums twice, even if the teacher was left in train mode."""
    return check_repeatability(
        inputs.teacher.student, lambda: _compute_sums(inputs, inputs.batch), tolerance=inputs.student.tolerance
    )


def check_per_document_sums(inputs: CrossTokenizerInputs) -> Check | None:
    """The objective's sums over some documents in one pass are those of each document alone."""
    if not inputs.module.objective.additive:
        return None
    difference = relative_difference(
        torch.stack([_compute_sums(inputs, document) for document in inputs.documents]).sum(0),
        _compute_sums(inputs, inputs.batch),
    )
    return Check.from_result(
        "per-document sums",
        difference <= inputs.student.tolerance,
        finding=f"within {difference:.1e}",
        why="this finds errors in packing, rows of another document, and means of means",
    )


def _compute_sums(inputs: CrossTokenizerInputs, batch: Batch) -> Tensor:
    with torch.no_grad():
        sums: Tensor = inputs.module(**batch)["sums"].double().cpu()
    return sums


QUICK_PAIR_CHECKS: Sequence[CrossTokenizerCheck] = (
    check_same_text,
    check_aligned_tokens,
    check_aligned_bytes,
    check_self_alignment,
    check_teacher_stop_token,
)
PAIR_CHECKS: Sequence[CrossTokenizerCheck] = (*QUICK_PAIR_CHECKS, check_per_document_sums, check_deterministic_teacher)
MODEL_CHECKS: Sequence[Invariant] = (
    check_lm_head_reproduced,
    check_packing_isolation,
    check_loss_matches_reference,
    check_label_mask,
)
STUDENT_CHECKS: Sequence[Invariant] = (check_gradient_accumulation, check_finite_differences)
