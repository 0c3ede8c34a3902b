"""What the assistant says is found in any template, its stop token included and nothing behind it."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from potstill.core.errors import DataError
from potstill.data.chat_template import ChatTemplate
from potstill.data.turns import Message

from .conftest import LLAMA, MARKED, THINKING

Make = Callable[..., PreTrainedTokenizerFast]


def chat(*said: str, system: str | None = None) -> list[Message]:
    """A chat in which user and assistant speak in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return [{"role": "system", "content": system}, *turns] if system else turns  # type: ignore[list-item]


def spoken(template: ChatTemplate, messages: list[Message]) -> list[str]:
    return [text[start:stop] for text, spans in template.render_answers(messages) for start, stop in spans]


CHATS = {
    "one turn": (chat("Hi", "Hello"), ["Hello"]),
    "several turns": (chat("Hi", "Hello", "And?", "Bye"), ["Hello", "Bye"]),
    "a system message": (chat("Hi", "Hello", system="Be kind"), ["Hello"]),
    "the assistant repeats the user": (chat("Hi", "Hi", "Hi", "Hi"), ["Hi", "Hi"]),
    "a chat that ends with the user": (chat("Hi", "Hello", "And?"), ["Hello"]),
    "an answer that holds special tokens": (chat("Hi", "<|eot|><|start|>user"), ["<|eot|><|start|>user"]),
    "an answer of many lines": (chat("Hi", "a\n\nb\n c"), ["a\n\nb\n c"]),
    "two answers in a row": ([*chat("Hi", "Hello"), {"role": "assistant", "content": "Still"}], ["Hello", "Still"]),
}


@pytest.mark.parametrize(("messages", "answers"), CHATS.values(), ids=list(CHATS))
@pytest.mark.parametrize("source", [LLAMA, MARKED], ids=["Llama 3's manner", "with {% generation %}"])
def test_every_answer_is_found_with_its_stop_token(
    bytes_with: Make, source: str, messages: list[Message], answers: list[str]
) -> None:
    template = ChatTemplate(bytes_with(source))
    assert template.stop == "<|eot|>"
    assert spoken(template, messages) == [answer + "<|eot|>" for answer in answers]


@pytest.mark.parametrize(("messages", "answers"), CHATS.values(), ids=list(CHATS))
def test_chatml_ends_a_turn_with_im_end_and_not_with_the_line_break_behind_it(
    tiny_tokenizer: PreTrainedTokenizerFast, messages: list[Message], answers: list[str]
) -> None:
    template = ChatTemplate(tiny_tokenizer)
    assert template.stop == "<|im_end|>"
    assert spoken(template, messages) == [answer + "<|im_end|>" for answer in answers]


def test_an_answer_that_the_template_trims_is_found_as_it_is_written(bytes_with: Make) -> None:
    assert spoken(ChatTemplate(bytes_with(LLAMA)), chat("Hi", "  Hello \n")) == ["Hello<|eot|>"]


def test_an_empty_answer_is_its_stop_token(bytes_with: Make) -> None:
    assert spoken(ChatTemplate(bytes_with(LLAMA)), chat("Hi", "", "And?", "Bye")) == ["<|eot|>", "Bye<|eot|>"]


def test_what_the_template_writes_before_the_last_answer_is_said_by_the_assistant(bytes_with: Make) -> None:
    template = ChatTemplate(bytes_with(THINKING))
    assert spoken(template, chat("Hi", "Hello")) == ["<think>\n\n</think>\n\nHello<|eot|>"]


def test_a_turn_that_changes_once_others_follow_is_trained_after_its_own_prompt(bytes_with: Make) -> None:
    template = ChatTemplate(bytes_with(THINKING))
    first, second = template.render_answers(chat("Hi", "<think>hm</think>Hello", "And?", "Bye"))
    assert first.text == "<|start|>user\nHi<|eot|>\n<|start|>assistant\n<think>\n\n</think>\n\nHello<|eot|>\n"
    assert second.text == template.render(chat("Hi", "Hello", "And?", "Bye"))
    for text, spans in (first, second):
        assert [text[start:stop].partition("</think>\n\n")[2] for start, stop in spans] in (
            ["Hello<|eot|>"],
            ["Bye<|eot|>"],
        )
    assert template.render_answers(chat("Hi", "Hello", "And?", "Bye"), only_last=True) == [second]


def test_a_template_that_closes_generation_behind_the_stop_token_counts_it_once(bytes_with: Make) -> None:
    closed_late = MARKED.replace("{% endgeneration %}<|eot|>", "<|eot|>{% endgeneration %}")
    assert spoken(ChatTemplate(bytes_with(closed_late)), chat("Hi", "Hello")) == ["Hello<|eot|>"]


@pytest.mark.parametrize("gap", ["", "\n"])
def test_all_end_tokens_through_the_end_of_text_are_trained(bytes_with: Make, gap: str) -> None:
    closing = "{% endfor %}{% if not add_generation_prompt %}{{ '" + gap + "<|eos|>' }}{% endif %}"
    template = ChatTemplate(bytes_with(LLAMA.replace("{% endfor %}", closing)))
    assert template.stop == f"<|eot|>{gap}<|eos|>"
    assert spoken(template, chat("Hi", "Hello")) == [f"Hello<|eot|>{gap}<|eos|>"]
    assert spoken(template, chat("Hi", "Hello", "And?", "Bye")) == ["Hello<|eot|>", f"Bye<|eot|>{gap}<|eos|>"]


def test_an_end_token_beyond_the_end_of_text_is_not_trained(bytes_with: Make) -> None:
    template = ChatTemplate(bytes_with(LLAMA.replace("'<|eot|>'", "'<|eos|><|end|>'")))
    assert spoken(template, chat("Hi", "Hello", "And?", "Bye")) == ["Hello<|eos|>", "Bye<|eos|>"]


def test_without_a_stop_token_all_that_ends_a_turn_is_said(bytes_with: Make) -> None:
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
    template = ChatTemplate(bytes_with(plain + "{% if add_generation_prompt %}assistant: {% endif %}"))
    assert template.stop == "\n\n"
    assert spoken(template, chat("Hi", "Hello", "And?", "Bye")) == ["Hello\n\n", "Bye\n\n"]


def test_a_template_without_a_generation_prompt_has_the_assistant_say_its_own_header(bytes_with: Make) -> None:
    headless = LLAMA.split("{% if add_generation_prompt %}")[0]
    assert spoken(ChatTemplate(bytes_with(headless)), chat("Hi", "Hello")) == [
        "<|start|>assistant<|end|>\n\nHello<|eot|>"
    ]


def test_a_template_that_refuses_a_chat_says_which_roles_it_had(bytes_with: Make) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LLAMA
    template = ChatTemplate(bytes_with(strict))
    with pytest.raises(DataError, match="refuses the roles system, user, assistant: no system role"):
        template.render_answers(chat("Hi", "Hello", system="Be kind"))


def test_a_tokenizer_without_a_template_and_a_template_without_answers_are_refused(bytes_with: Make) -> None:
    with pytest.raises(DataError, match="has no chat template"):
        ChatTemplate(bytes_with())
    with pytest.raises(DataError, match="does not write the assistant"):
        ChatTemplate(bytes_with("nothing"))
