"""Windows of the student that are too long for a teacher with another tokenizer, found before training.

The windows of a text have at most `--context` tokens of the student. The same text may have more tokens of the teacher
than the teacher has positions.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Int64

from potstill.data.cross_tokenizer.packs import TokenizerInfo, decode_window, translate_windows
from potstill.data.pack_fields import GROUPS, get_field
from potstill.data.packing import Packs

WINDOWS_PER_CALL = 256  # texts that the teacher's tokenizer reads at once
MAX_TOKENS_PER_BYTE = 2  # a bound that no tokenizer with a normalizer or a template of ours reaches
MARKER_TOKENS = 64


def count_teacher_tokens(
    packs: Packs, student: TokenizerInfo, teacher: TokenizerInfo, *, max_length: int
) -> Int64[np.ndarray, " documents"]:
    """The length of every window in the teacher's tokens, exact above `max_length` and an upper bound below it."""
    sizes = np.array([len(piece) for piece in student.pieces.by_id])
    ends = np.cumsum(packs.lengths, dtype=np.int64)
    num_bytes = np.add.reduceat(sizes[packs.input_ids], ends - packs.lengths)
    counts = MAX_TOKENS_PER_BYTE * num_bytes + MARKER_TOKENS
    suspects = np.flatnonzero(counts > max_length)
    for start in range(0, len(suspects), WINDOWS_PER_CALL):
        numbers = suspects[start : start + WINDOWS_PER_CALL]
        spans = [slice(ends[n] - packs.lengths[n], ends[n]) for n in numbers]
        counts[numbers] = _bound_lengths([packs.input_ids[span].tolist() for span in spans], student, teacher)
        for n, span in zip(numbers, spans, strict=True):
            if counts[n] > max_length:
                ids, labels = (
                    torch.from_numpy(array[span].astype(np.int64)) for array in (packs.input_ids, packs.labels)
                )
                counts[n] = len(translate_windows([(ids, labels)], student, teacher)[0].input_ids)
    return counts


def _bound_lengths(windows: Sequence[Sequence[int]], student: TokenizerInfo, teacher: TokenizerInfo) -> list[int]:
    """The tokens of the teacher for each window, and one more for an end of text."""
    is_plain = student.chat_markers is None or teacher.chat_markers is None
    texts = [decode_window(ids, student, teacher).text for ids in windows]
    return [len(ids) + 1 for ids in teacher.tokenizer(texts, add_special_tokens=is_plain).input_ids]


def keep_documents(packs: Packs, is_kept: Bool[np.ndarray, " documents"]) -> Packs:
    """`packs` without the other documents and without packs that this empties; a group goes as a whole."""
    if GROUPS.name in packs.fields:
        groups = packs.fields[GROUPS.name]
        is_kept = is_kept & ~((groups >= 0) & np.isin(groups, groups[~is_kept]))
    sizes = np.add.reduceat(is_kept.astype(np.int64), packs.document_offsets[:-1])
    lengths, is_kept_token = packs.lengths[is_kept], np.repeat(is_kept, packs.lengths)
    document_offsets = np.concatenate([[0], np.cumsum(sizes[sizes > 0])])
    return replace(
        packs,
        input_ids=packs.input_ids[is_kept_token],
        labels=packs.labels[is_kept_token],
        lengths=lengths,
        token_offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[document_offsets],
        document_offsets=document_offsets,
        fields={
            name: values[is_kept_token if get_field(name).per == "token" else is_kept]
            for name, values in packs.fields.items()
        },
    )
