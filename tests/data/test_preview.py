"""What is shown of a data set is what is in it."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from potstill.core.types import IGNORE
from potstill.data.corpus import Corpus, load_corpus, stream_corpus
from potstill.data.preview import HEAD_TOKENS, TAIL_TOKENS, describe, render, split_pieces
from potstill.data.row_reader import RowReader
from potstill.data.token_dataset import TokenizedDocument

Lines = Callable[..., Path]
PAIRS = [{"prompt": f"Question {i}", "response": "Answer" * (i + 1)} for i in range(10)]


def printed(description: dict[str, object], *, colour: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=200, force_terminal=colour, color_system="truecolor" if colour else None
    )
    console.print(render(description))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_numbers_are_those_of_the_corpus(lines: Lines, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = load_corpus(lines([*PAIRS, {"prompt": "a", "response": ""}]), split="all")
    said = describe(corpus, tiny_tokenizer, length=64)
    answers = sum(len(row["response"]) for row in PAIRS)
    assert said["documents"] == 10
    assert said["trained_tokens"] == answers + 10
    assert said["trained_share"] == said["trained_tokens"] / said["tokens"]
    assert said["bytes"] == sum(len(row["prompt"]) + len(row["response"]) + 1 for row in PAIRS)
    assert said["last_trained"] == {"<|im_end|>": 10}
    assert said["dropped"] == {"empty response": 1}
    assert said["packs"]["count"] >= said["tokens"] / 64
    assert said["token_percentiles"]["100"] == len("suser\nQuestion 9e\nsassistant\n") + len("Answer" * 10) + len("e\n")
    assert json.loads(json.dumps(said)) == said


def test_pieces_joined_are_the_document(lines: Lines, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    said = describe(load_corpus(lines(PAIRS), split="all"), tiny_tokenizer)
    assert [example["document"] for example in said["examples"]] == [0, 4, 9]
    first = said["examples"][0]["pieces"]
    assert [(piece["text"], piece["trained"]) for piece in first] == [
        ("<|im_start|>user\nQuestion 0<|im_end|>\n<|im_start|>assistant\n", False),
        ("Answer<|im_end|>", True),
        ("\n", False),
    ]


def test_the_middle_of_a_long_run_is_left_out_and_said_so(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tiny_tokenizer("a" * 300)["input_ids"]
    head, tail = split_pieces(TokenizedDocument(ids, [IGNORE] * 300), tiny_tokenizer)
    assert (len(head["text"]), len(tail["text"]), head["omitted_tokens"]) == (
        HEAD_TOKENS,
        TAIL_TOKENS,
        300 - HEAD_TOKENS - TAIL_TOKENS,
    )


def test_trained_tokens_are_coloured_and_others_are_not(lines: Lines, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    said = describe(load_corpus(lines(PAIRS[:1]), split="all"), tiny_tokenizer)
    shown = printed(said, colour=True)
    assert "\x1b[1;32mAnswer<|im_end|>\x1b[0m" in shown
    assert "\x1b[2m<|im_start|>assistant↵\x1b[0m" in shown


def test_text_that_looks_like_markup_is_shown_as_it_is(lines: Lines, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "[bold]a[/bold] [/]", "response": "[red]b"}]
    shown = printed(describe(load_corpus(lines(rows), split="all"), tiny_tokenizer))
    assert "[bold]a[/bold] [/]" in shown
    assert "[red]b" in shown


def test_a_stream_is_described_by_its_beginning(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = datasets.Dataset.from_list([{"text": "a" * 99}] * 50).to_iterable_dataset()
    blank = Corpus("a/b", "text", datasets.Dataset.from_dict({}), None, None, {})
    said = describe(stream_corpus(blank, rows, RowReader(), "all", None), tiny_tokenizer, limit=1000)
    assert (said["documents"], said["bytes"]) == (10, None)
    assert "unknown, a stream" in printed(said)


def test_without_color_marks_say_what_is_trained(lines: Lines, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    description = describe(load_corpus(lines(PAIRS), split="all"), tiny_tokenizer)
    console = Console(file=io.StringIO(), width=200)
    console.print(render(description, marks=True))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "⟦Answer" in text
    assert "⟦Question" not in text
    assert "⟦trained on⟧  read only" in text
