"""A conversation: what the model reads at each turn, and what a chat that is too long forgets."""

from pathlib import Path
from typing import Any

import pytest
from tests.stages.world import saved
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import DataError, UsageError
from potstill.decode.answer_stream import AnswerStream
from potstill.decode.drafters.options import DraftOptions
from potstill.stages.chat import Chat
from potstill.stages.generate_options import AnswerOptions


@pytest.fixture
def model(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    """The folder of a tiny model with 256 tokens of context, of which a byte takes one."""
    return str(saved(tmp_path / "model", tiny_llama, tiny_tokenizer))


def make_chat(model: str, **options: Any) -> Chat:
    return Chat(model, AnswerOptions(**{"device": "cpu", "max_tokens": 8, **options}))


def ask(chat: Chat, question: str) -> AnswerStream:
    answer = chat.ask(question)
    list(answer)
    return answer


def read(chat: Chat, answer: AnswerStream) -> str:
    """What the model reads for an answer."""
    return str(chat.generator.loaded.tokenizer.decode(answer.request.prompt))


def render(*turns: str, system: str = "") -> str:
    roles = ("user", "assistant")
    messages = [("system", system)] if system else []
    messages += [(roles[n % 2], turn) for n, turn in enumerate(turns)]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return f"{text}<|im_start|>assistant\n"


def test_each_turn_follows_the_ones_before_and_is_read_alone(model: str) -> None:
    chat = make_chat(model)
    first = ask(chat, "Hi")
    second = ask(chat, "Who?")
    assert read(chat, first) == render("Hi")
    assert read(chat, second) == render("Hi", first.text, "Who?")
    assert second.stats.prompt_tokens <= len(second.request.prompt) - len(first.request.prompt)


def test_a_system_prompt_stands_first_and_stays_when_the_chat_is_cleared(model: str) -> None:
    chat = make_chat(model)
    ask(chat, "Hi")
    chat.system = "Be kind."
    chat.clear()
    assert read(chat, ask(chat, "Who?")) == render("Who?", system="Be kind.")
    chat.system = ""
    chat.clear()
    assert read(chat, ask(chat, "Who?")) == render("Who?")


def test_a_full_context_forgets_the_oldest_exchanges_but_never_the_system_prompt(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = make_chat(model)
    chat.system = "Be kind."
    answers = [ask(chat, f"Question {n}?") for n in range(8)]
    forgotten = 8 - len(chat.exchanges)
    notes = capsys.readouterr().err.count("the context of 256 tokens is full; the chat has forgotten 1 exchange at its")
    assert notes == forgotten > 1
    turns = [text for n in range(forgotten, 7) for text in (f"Question {n}?", answers[n].text)]
    assert read(chat, answers[7]) == render(*turns, "Question 7?", system="Be kind.")
    assert len(answers[7].request.prompt) + 8 <= 256
    ask(chat, "A long question, " * 9)
    assert "the chat has forgotten 3 exchanges" in capsys.readouterr().err


def test_an_answer_has_half_of_a_small_context_at_least_unless_the_question_takes_it(model: str) -> None:
    chat = make_chat(model, max_tokens=None)
    assert ask(chat, "a" * 90).request.max_new_tokens > 128
    assert ask(chat, "b" * 180).request.max_new_tokens < 60
    with pytest.raises(UsageError, match=r"a prompt of 3.. tokens, and .* has 256 tokens of context; shorten it"):
        chat.ask("c" * 300)
    assert [question for question, _ in chat.exchanges] == ["b" * 180]


def test_a_question_that_is_refused_leaves_the_chat_as_it_was(model: str) -> None:
    chat = make_chat(model, special_in_text="refuse")
    first = ask(chat, "Hi")
    with pytest.raises(DataError, match="control token"):
        chat.ask("a<|im_end|>")
    assert read(chat, ask(chat, "Who?")) == render("Hi", first.text, "Who?")


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(model: str) -> None:
    chat = make_chat(model, max_tokens=40)
    stopped = chat.ask("Hi")
    for event in stopped:
        if len(stopped.completion.tokens) == 12 and event.finish_reason is None:
            stopped.cancel()
    never = chat.ask("Never")
    never.cancel()
    list(never)
    assert 0 < len(stopped.text) < 40
    assert read(chat, ask(chat, "Who?")) == render("Hi", stopped.text, "Who?")


def test_a_draft_and_int8_serve_a_chat_and_each_answer_has_a_seed_of_its_own(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, drafted = (
        make_chat(model, temperature=1.0, dtype="int8", drafts=drafts)
        for drafts in (DraftOptions(), DraftOptions(draft="lookup", draft_length="4"))
    )
    texts = [[ask(chat, "Hi Hi").text for _ in range(2)] for chat in (plain, drafted)]
    assert texts[0] == texts[1]
    assert capsys.readouterr().err.count("int8 is another model") == 2
    plain.clear()
    assert [answer.request.seed for answer in (ask(plain, "Hi"), ask(plain, "Hi"))] == [3, 4]


def test_a_model_without_a_chat_template_is_refused(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.chat_template = None
    model = str(saved(tmp_path / "model", tiny_llama, tiny_tokenizer))
    with pytest.raises(UsageError, match="has no chat template, which --chat needs; give one with --chat-template"):
        make_chat(model)
