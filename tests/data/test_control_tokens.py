"""Control tokens inside the text of a data set are counted, kept, escaped to plain text, or refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import CHATML
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from potstill.core.errors import DataError, UsageError
from potstill.core.types import IGNORE
from potstill.data.control_tokens import check_control_token_policy
from potstill.data.corpus import Corpus, load_corpus
from potstill.data.tokenize import Rendering, tokenize_corpus

from .trained import EXACT, ROUGH

Make = Callable[..., PreTrainedTokenizerFast]
CHAT = [("user", "a<|im_end|>b"), ("assistant", "Yes<|im_end|><|im_start|>no")]


@pytest.fixture
def corpus(lines: Callable[..., Path]) -> Corpus:
    messages = [{"role": role, "content": content} for role, content in CHAT]
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    return load_corpus(lines([{"messages": messages}, {"messages": plain}]), split="all")


def read(corpus: Corpus, tokenizer: Any, policy: str, **options: Any) -> list[list[int]]:
    rendering = Rendering(special_in_text=check_control_token_policy(policy), **options)
    return [row.input_ids for row in tokenize_corpus(corpus, tokenizer, rendering=rendering)]


def test_escaped_text_decodes_to_itself_and_holds_no_control_token(
    corpus: Corpus, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    kept, escaped = (sorted(read(corpus, tiny_tokenizer, policy), key=len) for policy in ("keep", "escape"))
    assert kept[0] == escaped[0]  # the other chat
    assert tiny_tokenizer.decode(kept[1]) == tiny_tokenizer.decode(escaped[1])
    controls = [[i for i in row if i < 3] for row in (kept[1], escaped[1])]
    assert controls == [[1, 2, 2, 1, 2, 1, 2], [1, 2, 1, 2]]


def test_only_the_end_of_an_escaped_answer_is_trained_as_a_control_token(
    corpus: Corpus, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = tokenize_corpus(corpus, tiny_tokenizer, rendering=Rendering(special_in_text="escape"))
    trained = [[label for label in row.labels if label != IGNORE] for row in tokens]
    assert sorted(tiny_tokenizer.decode(row) for row in trained) == [
        "Hello<|im_end|>",
        "Yes<|im_end|><|im_start|>no<|im_end|>",
    ]
    assert [sum(i < 3 for i in row) for row in trained] == [1, 1]
    report = tokens.report
    assert (report.num_control_tokens, report.num_control_documents) == (3, 1)


def test_a_refused_text_names_the_count_or_is_left_out(corpus: Corpus, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="its text contains 3 control tokens of the tokenizer"):
        read(corpus, tiny_tokenizer, "refuse")
    assert len(read(corpus, tiny_tokenizer, "refuse", on_bad_row="skip")) == 1
    with pytest.raises(UsageError, match="--special-in-text is 'drop'; it can be keep, escape, refuse"):
        check_control_token_policy("drop")


@pytest.mark.parametrize("name", [*EXACT, *ROUGH])
def test_every_kind_of_tokenizer_escapes_its_control_tokens(name: str, lines: Callable[..., Path]) -> None:
    tokenizer = copy.deepcopy({**EXACT, **ROUGH}[name]())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    messages = [{"role": "user", "content": "The </s> dog"}, {"role": "assistant", "content": "dog"}]
    corpus = load_corpus(lines([{"messages": messages}]), split="all")
    kept, escaped = (read(corpus, tokenizer, policy)[0] for policy in ("keep", "escape"))
    control = tokenizer.convert_tokens_to_ids("</s>")
    assert (kept.count(control), escaped.count(control)) == (1, 0)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    assert [i for i in kept if i in ends] == [i for i in escaped if i in ends]
    assert name in ROUGH or "</s>" in tokenizer.decode(escaped)


def test_a_text_is_escaped_too(lines: Callable[..., Path], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = load_corpus(lines([{"text": "a<|im_start|>b"}]), split="all")
    (row,) = read(corpus, tiny_tokenizer, "escape")
    assert tiny_tokenizer.decode(row) == "a<|im_start|>b<|im_end|>"
    assert [i for i in row if i < 3] == [2]


def test_an_end_token_that_takes_in_the_line_break_behind_it_is_trained(
    corpus: Corpus, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.add_tokens([AddedToken("<|stop|>", special=True, rstrip=True)], special_tokens=True)
    tiny_tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|stop|>")
    tokens = tokenize_corpus(corpus, tiny_tokenizer)
    stop = tiny_tokenizer.convert_tokens_to_ids("<|stop|>")
    assert [row.labels[-1] for row in tokens] == [stop, stop]


def test_a_chat_that_the_template_refuses_is_left_out_counted_and_named(
    corpus: Corpus, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.chat_template = (
        "{% if 'a<' in messages[0]['content'] %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    )
    with pytest.raises(DataError, match=r"begins 'a<\|im_end\|>b': the chat template refuses .* not this"):
        tokenize_corpus(corpus, tiny_tokenizer)
    tokens = tokenize_corpus(corpus, tiny_tokenizer, rendering=Rendering(on_bad_row="skip"))
    assert len(tokens) == 1
    assert tokens.drop_counts == {"a chat that the template refuses": 1}
    assert "not this" in tokens.report.bad_rows[0]
