"""The chat templates known by name: what they write, and what of it is trained."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from tests.data.trained import byte_level, sentencepiece
from transformers import PreTrainedTokenizerFast

from potstill.core.errors import DataError
from potstill.core.types import IGNORE
from potstill.data.chat_template import ChatTemplate
from potstill.data.corpus import Corpus
from potstill.data.document_table import build_table
from potstill.data.tokenize import Rendering, tokenize_corpus
from potstill.models.tokenizers.named_templates import MINICHAT_SYSTEM, NAMED_TEMPLATES, PHOENIX_SYSTEM

CHAT = [
    {"role": "user", "content": "The quick dog?"},
    {"role": "assistant", "content": "A brown fox."},
    {"role": "user", "content": "And you?"},
    {"role": "assistant", "content": "party"},
]
SYSTEM = {"role": "system", "content": "Be kind."}
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece,
    "spaces behind special tokens": lambda: sentencepiece(scheme="always"),
}


def with_template(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy with this template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = NAMED_TEMPLATES[name]
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **rendering: Any) -> Any:
    """The ids and labels of one chat."""
    corpus = Corpus("chats", "chat", build_table([{"messages": messages}]), None, None, {})
    return tokenize_corpus(corpus, tokenizer, rendering=Rendering(**rendering))[0]


def read_targets(tokenizer: PreTrainedTokenizerFast, row: Any) -> list[str]:
    """The trained spans, decoded."""
    spans, previous = [], IGNORE
    for token, label in zip(row.input_ids, row.labels, strict=True):
        if label != IGNORE:
            spans += [[]] if previous == IGNORE else []
            spans[-1].append(int(token))
        previous = label
    return [tokenizer.decode(span) for span in spans]


def test_minichat_writes_what_the_authors_write() -> None:
    template = ChatTemplate(with_template("minichat", byte_level()))
    turns = "[|User|] The quick dog?</s>[|Assistant|] A brown fox.</s>[|User|] And you?</s>[|Assistant|]"
    assert template.render(CHAT[:3], add_generation_prompt=True) == f"<s>{MINICHAT_SYSTEM}</s>{turns}"
    assert template.render([SYSTEM, *CHAT]) == f"<s>Be kind.</s>{turns} party</s>"


def test_phoenix_writes_what_the_authors_write() -> None:
    template = ChatTemplate(with_template("phoenix", byte_level()))
    turns = "Human: <s>The quick dog?</s>Assistant: <s>A brown fox.</s>Human: <s>And you?</s>Assistant: <s>"
    assert template.render(CHAT[:3], add_generation_prompt=True) == f"{PHOENIX_SYSTEM}\n\n{turns}"
    assert template.render([SYSTEM, *CHAT]) == f"Be kind.\n\n{turns}party</s>"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_minichat_trains_each_answer_with_its_end_token_alone(kind: str) -> None:
    tokenizer = with_template("minichat", TOKENIZERS[kind]())
    spans = [span.strip() for span in read_targets(tokenizer, tokenize(tokenizer, CHAT))]
    assert spans == ["A brown fox.</s>", "party</s>"]
    assert ChatTemplate(tokenizer).end_tokens == [tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_phoenix_trains_the_inner_start_token_too(kind: str) -> None:
    tokenizer = with_template("phoenix", TOKENIZERS[kind]())
    spans = [span.replace("<s> ", "<s>") for span in read_targets(tokenizer, tokenize(tokenizer, CHAT))]
    assert spans == ["<s>A brown fox.</s>", "<s>party</s>"]
    last = read_targets(tokenizer, tokenize(tokenizer, CHAT, only_last=True))
    assert [span.replace("<s> ", "<s>") for span in last] == ["<s>party</s>"]


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_the_decoded_labels_are_the_answers_and_a_human_turn_changes_none(name: str) -> None:
    tokenizer = with_template(name, byte_level())
    row = tokenize(tokenizer, CHAT)
    targets = [int(label) for label in row.labels if label != IGNORE]
    assert (
        tokenizer.decode(targets)
        == {
            "minichat": " A brown fox.</s> party</s>",
            "phoenix": "<s>A brown fox.</s><s>party</s>",
        }[name]
    )
    other = tokenize(tokenizer, [{"role": "user", "content": "Something else 世界</s>"}, *CHAT[1:]])
    assert [int(label) for label in other.labels if label != IGNORE] == targets
    assert len(other.input_ids) != len(row.input_ids)


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_an_answer_of_weight_0_is_not_trained(name: str) -> None:
    tokenizer = with_template(name, byte_level())
    unweighted = {**CHAT[1], "fields": '{"weight": 0}'}
    (span,) = read_targets(tokenizer, tokenize(tokenizer, [CHAT[0], unweighted, *CHAT[2:]]))
    assert span.removeprefix("<s>").strip() == "party</s>"


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_the_generation_prompt_is_the_beginning_of_the_answered_chat(name: str) -> None:
    tokenizer = with_template(name, byte_level())
    template = ChatTemplate(tokenizer)
    prompt, whole = template.render(CHAT[:1], add_generation_prompt=True), template.render(CHAT[:2])
    assert whole.startswith(prompt)
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    assert ids[: len(tokenizer(prompt, add_special_tokens=False).input_ids)] == (
        tokenizer(prompt, add_special_tokens=False).input_ids
    )


def test_the_special_tokens_are_those_of_the_tokenizer(bytes_with: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = bytes_with(NAMED_TEMPLATES["phoenix"])
    assert (
        ChatTemplate(tokenizer)
        .render(CHAT[:2])
        .endswith("Human: <|bos|>The quick dog?<|eos|>Assistant: <|bos|>A brown fox.<|eos|>")
    )
    tokenizer.bos_token = None
    assert ChatTemplate(tokenizer).render(CHAT[:2]).endswith("Assistant: <|eos|>A brown fox.<|eos|>")
    tokenizer = bytes_with(NAMED_TEMPLATES["minichat"])
    tokenizer.bos_token = None
    assert ChatTemplate(tokenizer).render(CHAT[:1]).startswith("‘MiniChat’")


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_what_the_template_cannot_write_is_refused(
    name: str, bytes_with: Callable[..., PreTrainedTokenizerFast]
) -> None:
    template = ChatTemplate(bytes_with(NAMED_TEMPLATES[name]))
    for messages in ([*CHAT, SYSTEM], [CHAT[0], {"role": "tool", "content": "12"}]):
        with pytest.raises(DataError, match=f"{name} writes no turn of the role {messages[-1]['role']} here"):
            template.render(messages)
    tokenizer = bytes_with(NAMED_TEMPLATES[name])
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=f"{name} needs a tokenizer with an end-of-text token"):
        ChatTemplate(tokenizer)
