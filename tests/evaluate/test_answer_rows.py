"""Of a chat each answer's own text and its end are scored, whatever words a template writes around them."""

from pathlib import Path

import pytest
import torch
from tests.stages.world import written
from tests.tiny import CHATML, byte_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.types import IGNORE
from potstill.data.corpus import load_corpus
from potstill.evaluate.answer_rows import LabeledDocument, build_answer_rows, find_answer, match_answers
from potstill.evaluate.perplexity import score
from potstill.evaluate.scoring_windows import Row
from potstill.stages.dataset import build_rows

CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Süß!"}]},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": " no. "},
        ]
    },
]
TEMPLATES = {
    "ChatML": CHATML,
    "an empty thinking block": CHATML.replace(
        "message['content'] +",
        "('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '') + message['content'] +",
    ),
    "a channel, and stripped": CHATML.replace(
        "message['content'] +", "('final a: ' if message['role'] == 'assistant' else '') + message['content'].strip() +"
    ),
    "no template": None,
}


def read(row: Row, tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORE]))


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_words_of_a_template_are_neither_scored_nor_counted(tmp_path: Path, template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    corpus = load_corpus(str(written(tmp_path / "chats.jsonl", CHATS)), split="all")
    rows = build_rows(corpus, tokenizer, documents=2)
    assert [row.num_bytes for row in rows] == [6, 6]
    end = "<|im_end|>"
    turns = {"a channel, and stripped": f"a{end}no.{end}", "no template": f"a no. {end}"}
    assert {read(row, tokenizer) for row in rows} == {f"Süß!{end}", turns.get(template, f"a{end} no. {end}")}


def test_labels_of_the_first_token_cost_and_count_nothing(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = list(tiny_tokenizer("abc").input_ids)
    for labels in (ids, [IGNORE, *ids[1:]]):
        (row,) = build_answer_rows([LabeledDocument(ids, labels, ["abc"])], tiny_tokenizer)
        assert (row.num_bytes, row.labels) == (2, [IGNORE, *ids[1:]])
    with torch.no_grad():
        logits = tiny_llama(torch.tensor([ids])).logits[0, :-1]
    paid = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
    assert score(tiny_llama, [row]).nll[0] == pytest.approx(paid.item(), rel=1e-5)


def test_a_turn_without_text_of_its_own_is_scored_as_it_is_labeled(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*tiny_tokenizer("Hi. call").input_ids, 2]
    labels = [IGNORE] * 4 + ids[4:]
    for answer in (None, "what the tokenizer does not write"):
        (row,) = build_answer_rows([LabeledDocument(ids, labels, [answer])], tiny_tokenizer)
        assert row.labels == labels
        assert row.num_bytes == len(answer or "call")
    assert build_answer_rows([LabeledDocument([], [], [])], tiny_tokenizer) == [Row([], [], 0)]


@pytest.mark.parametrize(
    ("text", "answer", "span"),
    [
        (b"Yes.\xff", "Yes.", (0, 4, 4)),
        (b"<think>\n\n</think>\n\na\xff", "a", (19, 20, 1)),
        (b"analysis a: a\xff", "a", (12, 13, 1)),
        (b" Yes. \xff", "Yes.", (1, 5, 4)),
        (b"Yes.\xff", " Yes. ", (0, 4, 6)),
        (b"Yes.\xff", "<think>\nHm.\n</think>\n\nYes.", (0, 4, 4)),
        (b"<think>\nHm.\n</think>\n\nYes.\xff", "<think>\nHm.\n</think>\n\nYes.", (0, 26, 26)),
        (b"think\xff\n", "", (5, 5, 0)),
        (b"YES.\xff", "yes.", None),
    ],
)
def test_an_answer_is_found_in_what_a_template_made_of_it(
    text: bytes, answer: str, span: tuple[int, int, int] | None
) -> None:
    assert find_answer(text, answer) == span


@pytest.mark.parametrize(
    ("texts", "answers", "matches"),
    [
        ([b"a\xff", b"b\xff"], ["a", "b"], ["a", "b"]),
        ([b"b\xff"], ["a", "b"], ["b"]),
        ([b"x a\xff\n", b"c\xff"], ["a", "b", "c"], ["a", "c"]),
        ([b"q\xff", b"c"], ["a", "b", "c"], [None, "c"]),
        ([b"a"], [None, "a"], [None]),
        ([b"b\xff"], ["", "b"], ["b"]),
        ([b"\xff"], ["", "b"], [""]),
    ],
)
def test_answers_that_are_not_trained_are_passed_over(
    texts: list[bytes], answers: list[str | None], matches: list[str | None]
) -> None:
    assert match_answers(texts, answers) == matches
