"""Do two tokenizers read text as the same ids? Found by encoding probes and comparing tables, never by widths."""

from transformers import PreTrainedTokenizerBase

from potstill.core.errors import VocabularyMismatch

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  def f(x):\n\treturn {x: 3.14159}  # 0123456789",
    "naïve façade, Übergröße, 世界, こんにちは, 안녕하세요, Привет, مرحبا",
    "🎉👩‍👩‍👧 → ∑ ≤ ½",
)


def shared_ids(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> int:
    """How many ids, from 0 on, stand for the same token on both sides; heads are cut to them.

    The rows by which families pad a vocabulary to a round width (Qwen: 151,936 against 152,064) stand for no token and
    fall away.

    Raises: VocabularyMismatch with the first text or id that the two read differently.
    """
    for text in PROBES:
        ours, theirs = (t(text, add_special_tokens=False).input_ids for t in (student, teacher))
        if ours != theirs:
            raise VocabularyMismatch(
                f"teacher and student read {text[:20]!r} as different ids ({theirs[:4]} and {ours[:4]}); "
                f"choose a teacher with the student's tokenizer, or --objective dskdv2_eta, which compares across"
            )
    by_id = [{i: token for token, i in t.get_vocab().items()} for t in (teacher, student)]
    shared = min(max(table) for table in by_id) + 1
    for i in range(shared):
        taught, learnt = (table.get(i) for table in by_id)
        if taught != learnt and taught is not None and learnt is not None:
            raise VocabularyMismatch(
                f"id {i} is {taught!r} for the teacher and {learnt!r} for the student; choose a teacher with the "
                f"student's tokenizer, or --objective dskdv2_eta, which compares across"
            )
    return shared


def real_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids stand for a token; a head may have more rows."""
    return max(tokenizer.get_vocab().values()) + 1
