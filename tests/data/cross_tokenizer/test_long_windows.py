"""Windows that a teacher with another tokenizer cannot read are found exactly, and leave the packs as they came."""

import numpy as np
import pytest
from tests.data.trained import byte_level
from tests.tiny import byte_tokenizer

from potstill.data.cross_tokenizer.long_windows import count_teacher_tokens, keep_documents
from potstill.data.cross_tokenizer.packs import CrossTokenizerPacks, TokenizerInfo
from potstill.data.packing import Packs, pack
from potstill.data.token_dataset import TokenizedDocument

SHORT, LONG = "a dog {}", "The quick brown fox jumps over the lazy dog, and the dog does not mind. {}"


@pytest.fixture
def packs() -> Packs:
    ids = [
        byte_level()((LONG if n % 3 == 0 else SHORT).format(n), add_special_tokens=False).input_ids for n in range(30)
    ]
    rows = [TokenizedDocument(np.array(row, np.int32), np.array([-100, *row[1:]], np.int32)) for row in ids]
    return pack(rows, length=64)


def test_long_windows_are_counted_as_they_are_read_and_only_they_go(packs: Packs) -> None:
    student, teacher = (TokenizerInfo.from_tokenizer(tokenizer) for tokenizer in (byte_level(), byte_tokenizer()))
    paired = CrossTokenizerPacks(packs, student, teacher)
    lengths = np.concatenate([paired[i]["teacher.lengths"].numpy() for i in range(len(packs))])
    for max_length in (8, 40, int(lengths.max()) - 1, int(lengths.max())):
        counts = count_teacher_tokens(packs, student, teacher, max_length=max_length)
        assert ((counts > max_length) == (lengths > max_length)).all()
        assert (counts[counts > max_length] == lengths[lengths > max_length]).all()
    is_kept = lengths <= 40
    kept = keep_documents(packs, is_kept)
    assert kept.lengths.tolist() == packs.lengths[is_kept].tolist()
    documents = [
        tuple(part.tolist())
        for i in range(len(packs))
        for part in packs[i]["input_ids"].split(packs[i]["lengths"].tolist())
    ]
    remaining = [
        tuple(part.tolist())
        for i in range(len(kept))
        for part in kept[i]["input_ids"].split(kept[i]["lengths"].tolist())
    ]
    assert remaining == [document for document, keep in zip(documents, is_kept, strict=True) if keep]
    assert all(len(kept[i]["lengths"]) for i in range(len(kept)))
    whole = keep_documents(packs, np.ones_like(is_kept))
    assert whole.digest == packs.digest
