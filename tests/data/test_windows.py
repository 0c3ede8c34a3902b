"""A long chat is cut so that every answer keeps its prompt, and no reader could tell the window from a short chat."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from potstill.core.types import IGNORE
from potstill.data.chat_template import ChatTemplate
from potstill.data.corpus import load_corpus
from potstill.data.packing import pack
from potstill.data.token_dataset import TokenizedDocument
from potstill.data.tokenize import tokenize_corpus
from potstill.data.turn_starts import find_turn_opener, find_turn_starts
from potstill.data.windows import count_windows, cut_windows, describe_loss, find_answers

from .conftest import LLAMA

Lines = Callable[..., Path]
Make = Callable[..., PreTrainedTokenizerFast]
FOLDED = (  # the system prompt within the first turn, as Llama 2 and Mistral have it
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' }}{% if loop.first and system is defined %}"
    "{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}{{ message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + '<|eos|>' }}{% endif %}{% endfor %}"
)


def chat(header: int, *turns: tuple[int, int], first: int = 100) -> TokenizedDocument:
    """A chat of distinct tokens: a header, and for each turn so many of a prompt and of an answer."""
    ids, labels, starts = list(range(first, first + header)), [IGNORE] * header, []
    for prompt, answer in turns:
        starts.append(len(ids))
        turn = list(range(first + len(ids), first + len(ids) + prompt + answer))
        ids, labels = ids + turn, labels + [IGNORE] * prompt + turn[prompt:]
    return TokenizedDocument(ids, labels, {}, tuple(starts))


@st.composite
def chats(draw: st.DrawFn) -> TokenizedDocument:
    turns = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 14)), min_size=1, max_size=5))
    return chat(draw(st.integers(1, 6)), *turns)


@given(chats(), st.integers(3, 24), st.booleans())
def test_every_label_is_trained_once_but_for_the_ends_of_answers_that_are_cut(
    row: TokenizedDocument, length: int, has_bos: bool
) -> None:
    windows = cut_windows(row, length=length, bos=row.input_ids[0] if has_bos else None)
    found = Counter(label for window in windows for label in window.labels.tolist() if label != IGNORE)
    assert max(found.values()) == 1
    answers = find_answers(np.array(row.labels, dtype=np.int32))
    for start, stop in answers:
        trained = [label in found for label in row.labels[start:stop]]
        assert trained[0]
        is_long = length - (stop - start) < max(1, length // 16)
        assert all(trained) or (is_long and trained == sorted(trained, reverse=True))
    assert any(window.is_cut for window in windows) == (len(found) < sum(stop - start for start, stop in answers))


@given(chats(), st.integers(3, 24), st.booleans())
def test_a_window_is_the_beginning_of_its_chat_and_what_precedes_its_answer(
    row: TokenizedDocument, length: int, has_bos: bool
) -> None:
    for window in cut_windows(row, length=length, bos=row.input_ids[0] if has_bos else None):
        ids = window.input_ids.tolist()
        assert 1 < len(ids) <= length
        assert window.labels[0] == IGNORE
        gaps = [place for place in range(1, len(ids)) if ids[place] != ids[place - 1] + 1]
        assert len(gaps) <= 1
        beginning = gaps[0] if gaps else len(ids) if ids[0] == row.input_ids[0] else 0
        assert ids[:beginning] == row.input_ids[:beginning]
        assert not has_bos or ids[0] == row.input_ids[0] or beginning == 0
        assert window.is_shortened == (bool(gaps) or ids[0] != row.input_ids[0])
        assert not window.is_cut or len(ids) == length


def test_windows_of_a_chat_come_out_as_written_by_hand() -> None:
    row = chat(
        2, (2, 2), (3, 2), (2, 3), (1, 2)
    )  # header 0 1, then 2 3 | 4 5, 6 7 8 | 9 10, 11 12 | 13 14 15, 16 | 17 18
    assert len(row.input_ids) == 19
    windows = cut_windows(row, length=11)
    places = [(window.input_ids - 100).tolist() for window in windows]
    assert places == [[*range(11)], [0, 1, *range(11, 19)]]
    assert [(window.labels[window.labels != IGNORE] - 100).tolist() for window in windows] == [
        [4, 5, 9, 10],
        [13, 14, 15, 17, 18],
    ]
    assert [window.is_shortened for window in windows] == [False, True]


def test_short_turns_share_windows_and_each_answer_keeps_half_a_window_before_it() -> None:
    row = chat(3, *[(34, 36)] * 24)
    windows = cut_windows(row, length=512)
    assert len(windows) == 7  # and not 18, one for each answer beyond the first window
    assert sum(len(window.input_ids) for window in windows) < 2.1 * len(row.input_ids)
    for window in windows[1:]:
        assert find_answers(window.labels)[0][0] >= 256


def test_where_not_even_the_last_turn_fits_its_end_stays_beside_a_short_system_prompt() -> None:
    (window,) = cut_windows(chat(2, (20, 3)), length=10)
    assert (window.input_ids - 100).tolist() == [0, 1, *range(17, 25)]
    (window,) = cut_windows(chat(6, (20, 3)), length=10)  # a long one would leave nothing of the question
    assert (window.input_ids - 100).tolist() == [*range(19, 29)]
    (window,) = cut_windows(chat(6, (20, 3)), length=10, bos=100)
    assert (window.input_ids - 100).tolist() == [0, *range(20, 29)]


def test_an_answer_longer_than_the_context_is_cut_at_its_end_and_has_no_stop_token() -> None:
    (window,) = cut_windows(chat(1, (3, 20)), length=8)
    assert (window.input_ids - 100).tolist() == [*range(8)]
    assert window.is_cut
    assert not window.is_shortened
    (window,) = cut_windows(chat(1, (9, 20)), length=8)
    assert (window.input_ids - 100).tolist() == [0, 7, 8, 9, 10, 11, 12, 13]
    assert (window.labels[window.labels != IGNORE] - 100).tolist() == [10, 11, 12, 13]


def test_an_answer_that_would_leave_its_prompt_no_room_is_cut_too() -> None:
    (window,) = cut_windows(chat(1, (50, 47)), length=48)  # 3 tokens of the prompt are the least
    assert (len(window.input_ids), window.is_cut) == (48, True)
    assert (window.input_ids - 100).tolist() == [0, *range(28, 75)]
    (window,) = cut_windows(chat(1, (50, 45)), length=48)
    assert (window.is_cut, (window.input_ids - 100).tolist()) == (False, [0, 49, 50, *range(51, 96)])


SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": role, "content": f"{word} {number}"}
    for number in range(6)
    for role, word in (("user", "a"), ("assistant", "Yes,"))
]


@pytest.mark.parametrize("name", ["ChatML", "Llama 3", "folded"])
@pytest.mark.parametrize("has_system", [True, False])
def test_a_window_reads_as_its_template_writes_a_shorter_chat(
    lines: Lines, bytes_with: Make, tiny_tokenizer: PreTrainedTokenizerFast, name: str, has_system: bool
) -> None:
    tokenizer = tiny_tokenizer if name == "ChatML" else bytes_with({"Llama 3": LLAMA, "folded": FOLDED}[name])
    system = [SYSTEM] if has_system else []
    tokens = tokenize_corpus(load_corpus(lines([{"messages": [*system, *TURNS]}]), split="all"), tokenizer)
    windows = cut_windows(tokens[0], length=len(tokens[0].input_ids) * 2 // 3)
    assert len(windows) > 1
    for window in windows[1:]:
        text = str(tokenizer.decode(window.input_ids.tolist()))
        count = text.count("Yes,")
        last = int(text.split("Yes, ")[-1][0])
        shorter = [*system, *TURNS[2 * (last + 1 - count) : 2 * (last + 1)]]
        rendered = tokenizer.apply_chat_template(shorter, return_dict=False)
        assert count > 1
        assert rendered[: len(window.input_ids)] == window.input_ids.tolist()
        assert str(tokenizer.decode(rendered[len(window.input_ids) :])).strip() == ""


def test_words_of_the_user_that_the_template_writes_too_are_found_where_the_user_says_them(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    template = ChatTemplate(tiny_tokenizer)
    messages = [{"role": role, "content": "user"} for role in ("system", "user", "assistant", "user", "assistant")]
    text = template.render(messages)
    starts = find_turn_starts(text, messages, find_turn_opener(template))
    assert [text[:start].endswith("<|im_start|>user\n") for start in starts] == [True, True]
    assert [text[start:].startswith("user<|im_end|>") for start in starts] == [True, True]


def test_rows_that_lost_something_are_counted_and_a_larger_context_is_named() -> None:
    rows = [chat(1, (3, 3), first=100 * i) for i in range(1, 10)]
    packs = pack([*rows, chat(1, (9, 3), first=5000), chat(1, (2, 30), first=6000)], length=10)
    assert packs.counts.to_dict() == {"documents": 11, "shortened": 1, "cut": 1, "longest": 33}
    assert describe_loss(packs.counts) == [
        "of 11 documents, 1 lost the beginning of what precedes an answer and 1 lost the end of an answer, "
        "to --context 10",
        "18% of the documents do not fit into --context 10; --context 33 holds 99 % of them whole",
    ]
    (sentence,) = describe_loss(pack([*rows * 5, chat(1, (2, 30), first=6000)], length=10).counts)
    assert sentence == "of 46 documents, 1 lost the end of an answer, to --context 10"
    text = TokenizedDocument(list(range(50)), [IGNORE, *range(1, 50)])
    assert describe_loss(pack([text], length=10).counts) == []
    assert pack([text], length=10).counts.split == 1
    many = count_windows([cut_windows(row, length=10) for row in rows * 5], [7] * 45, context=10, dropped=0, groups=0)
    assert describe_loss(many) == []


def test_no_answer_of_real_chats_loses_its_prompt(potstill_data: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = potstill_data / "instruct/hiyouga__LLaMA-Factory/data/kto_en_demo.json.gz"
    tokens = tokenize_corpus(load_corpus(path, columns={"messages": "messages"}, limit=60), tiny_tokenizer)
    windows = [window for row in tokens for window in cut_windows(row, length=1024)]
    assert sum(window.is_cut for window in windows) > 20
    assert sum(window.is_shortened for window in windows) > 10
    opening = tiny_tokenizer("<|im_start|>assistant\n").input_ids
    for window in windows:
        start = find_answers(window.labels)[0][0]
        assert window.input_ids[start - len(opening) : start].tolist() == opening


def test_the_beginning_stays_beside_the_last_turn_where_earlier_answers_are_not_trained() -> None:
    row = chat(6, (4, 2), (3, 3))  # header 0 to 5, then 6 7 8 9 | 10 11, 12 13 14 | 15 16 17
    labels = [label if place > 14 else IGNORE for place, label in enumerate(row.labels)]
    (window,) = cut_windows(row._replace(labels=labels), length=12)
    assert (window.input_ids - 100).tolist() == [*range(6), *range(12, 18)]
