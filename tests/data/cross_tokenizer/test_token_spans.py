"""Where tokens lie in their text, on random Unicode and on real traps, for every kind of tokenizer."""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.data.trained import EXACT, ROUGH, byte_level, sentencepiece, unigram
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from potstill.data.cross_tokenizer.token_spans import decode_with_spans, locate_tokens
from potstill.models.tokenizers.token_bytes import read_token_bytes
from potstill.ops.align import match_spans, merge_spans

Make = Callable[[], PreTrainedTokenizerFast]
law = settings(max_examples=40, derandomize=True)
scripts = "ab d\n\té世界안🎉👩\u200d\u0301\u00a0ßﬁ"
texts = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=30),
    st.text(st.sampled_from(scripts), max_size=30),
    st.lists(st.sampled_from([" the", "dog ", "</s>", "  ", "世", "🎉", "e\u0301", "x"]), max_size=8).map("".join),
)
each_exact = pytest.mark.parametrize("make", EXACT.values(), ids=list(EXACT))
each = pytest.mark.parametrize("make", [*EXACT.values(), *ROUGH.values()], ids=[*EXACT, *ROUGH])


def spans_of(text: str, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    (found,) = locate_tokens([text], tokenizer, read_token_bytes(tokenizer))
    return found.spans


def cut(text: str, tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """What each token stands for in the text."""
    return [text.encode()[start:end] for start, end in spans_of(text, tokenizer).tolist()]


def require_lawful(text: str, spans: Tensor) -> None:
    """Spans lie within the text, ascend and do not overlap."""
    assert (spans[:, 0] <= spans[:, 1]).all()
    assert (spans[1:, 0] >= spans[:-1, 1]).all()
    assert spans.numel() == 0 or (int(spans.min()) >= 0 and int(spans.max()) <= len(text.encode()))


@each_exact
@given(text=texts)
@example(text="<s>the</s> the</s></s>")
@example(text="   ")
@law
def test_tokens_cover_the_text_and_each_stands_for_its_own_bytes(make: Make, text: str) -> None:
    tokenizer = make()
    if "▁" in text:  # SentencePiece reads it as a space; it is looked at below
        return
    known = read_token_bytes(tokenizer)
    (found,) = locate_tokens([text], tokenizer, known)
    require_lawful(text, found.spans)
    parts = [text.encode()[start:end] for start, end in found.spans.tolist()]
    assert b"".join(parts) == text.encode()
    whole = [known.by_id[i] for i in found.ids.tolist()]
    assert all(part in (piece, piece.removeprefix(b" "), b"") for part, piece in zip(parts, whole, strict=True))
    around = sum(part == b"" for part in parts)
    dummies = 1 + text.count("</s>") + text.count("<s>") + text.count("<unk>")
    assert around <= 1 + dummies  # a BOS, and a space in front of each run


@each
@given(text=texts)
@law
def test_no_token_is_put_where_the_text_reads_otherwise(make: Make, text: str) -> None:
    tokenizer = make()
    known = read_token_bytes(tokenizer)
    (found,) = locate_tokens([text], tokenizer, known)
    require_lawful(text, found.spans)
    for i, (start, end) in zip(found.ids.tolist(), found.spans.tolist(), strict=True):
        assert text.encode()[start:end] in (known.by_id[i], known.by_id[i].removeprefix(b" "), b"")


@each
@given(text=texts)
@law
def test_a_tokenizer_beside_itself_is_the_identity(make: Make, text: str) -> None:
    spans = spans_of(text, make())
    real = torch.nonzero(spans[:, 0] < spans[:, 1])[:, 0]
    assert torch.equal(match_spans(spans, spans), torch.stack([real, real], -1))


@given(text=texts, first=st.sampled_from([*EXACT.values()]), second=st.sampled_from([*EXACT.values()]))
@law
def test_all_of_a_text_is_in_groups_whichever_two_tokenizers_read_it(text: str, first: Make, second: Make) -> None:
    if "▁" in text:
        return
    ours, theirs = spans_of(text, first()), spans_of(text, second())
    groups = merge_spans(ours, theirs)
    for spans, group in ((ours, groups.first), (theirs, groups.second)):
        assert torch.equal(group >= 0, spans[:, 0] < spans[:, 1])


@given(text=texts)
@law
def test_a_vocabulary_permuted_gives_the_same_spans(text: str) -> None:
    tokenizer, permuted = byte_level(), permuted_byte_level()
    (ours,), (theirs,) = (locate_tokens([text], one, read_token_bytes(one)) for one in (tokenizer, permuted))
    assert torch.equal(ours.spans, theirs.spans)
    assert len(match_spans(ours.spans, theirs.spans)) == len(ours.ids)


def permuted_byte_level() -> PreTrainedTokenizerFast:
    """`byte_level()` with the ids of its ordinary tokens shuffled."""
    import json

    from tokenizers import Tokenizer

    spec = json.loads(byte_level().backend_tokenizer.to_str())
    added = {token["content"] for token in spec["added_tokens"]}
    names = [name for name in spec["model"]["vocab"] if name not in added]
    ids = [spec["model"]["vocab"][name] for name in names]
    random.Random(0).shuffle(ids)
    spec["model"]["vocab"].update(zip(names, ids, strict=True))
    shuffled = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
    assert shuffled("the dog").input_ids != byte_level()("the dog").input_ids
    return shuffled


def test_half_characters_lie_within_their_character() -> None:
    assert cut("é世🐙", byte_level(261)) == [bytes([byte]) for byte in "é世🐙".encode()]
    assert b"\xf0" in cut("🐙", sentencepiece())


def test_a_bos_and_the_space_before_a_text_stand_for_nothing() -> None:
    assert cut("Hi", sentencepiece())[:3] == [b"", b"", b"H"]
    assert cut(" Hi", sentencepiece())[:3] == [b"", b" ", b"H"]
    assert cut("x</s>x", sentencepiece(scheme="always")) == [b"", b"", b"x", b"</s>", b"", b"x"]
    assert cut("  ", sentencepiece()) == [b"", b" ", b" "]


def test_a_special_token_that_is_written_out_is_one_groups_text_for_who_does_not_know_it() -> None:
    text = "<|im_start|>user\nHi<|im_end|>"
    knows, reads = spans_of(text, byte_level()), spans_of(text, sentencepiece(scheme="never"))
    assert knows[0].tolist() == [0, 12]
    assert len(reads) > len(knows)
    groups = merge_spans(knows, reads)
    assert int((groups.second == groups.first[0]).sum()) > 1
    assert int((groups.first == groups.first[0]).sum()) == 1


def test_what_a_normaliser_composed_has_no_span_and_costs_only_itself() -> None:
    text = "e\u0301 the 世🎉"
    found = cut(text, byte_level(nfc=True))
    assert found[0] == b""
    assert b"".join(found).decode() == " the 世🎉"


def test_what_was_lowered_or_unknown_has_no_span() -> None:
    assert not set("TDﬁ") & set(b"".join(cut("The Dog ﬁ", unigram(rewrites=True))).decode())
    assert "🐙".encode() not in cut("the 🐙 dog", unigram())
    assert b"".join(cut("the 🐙 dog", unigram())).decode() == "the  dog"


def test_a_text_with_the_mark_of_a_space_in_it_is_not_taken_for_one_with_spaces() -> None:
    assert b"".join(cut("a▁b", sentencepiece(scheme="never"))) in (b"a", b"ab")  # as "▁b" is one token or two


def test_many_texts_are_located_as_each_alone() -> None:
    batch = ["the dog", "", "世界", "é e\u0301"]
    tokenizer = byte_level()
    found = locate_tokens(batch, tokenizer, read_token_bytes(tokenizer))
    assert [one.spans.tolist() for one in found] == [spans_of(text, tokenizer).tolist() for text in batch]
    assert locate_tokens([], tokenizer, read_token_bytes(tokenizer)) == []


def test_ids_are_read_back_to_bytes_even_when_cut_within_a_character() -> None:
    tokenizer = byte_level(261)
    ids = tokenizer("<|im_start|>é").input_ids
    text, spans = decode_with_spans(ids[:-1], read_token_bytes(tokenizer))
    assert text == b"\xc3"
    assert spans.tolist() == [[0, 0], [0, 1]]
