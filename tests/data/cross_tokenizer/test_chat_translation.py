"""A chat told again by another template: the same turns, the teacher's own marks, wherever the window was cut."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from datasets import Dataset
from tests.data.conftest import LLAMA, MARKED, THINKING
from tests.data.test_chat_template import chat
from tests.data.trained import byte_level, sentencepiece
from transformers import PreTrainedTokenizerFast

from potstill.core.types import IGNORE
from potstill.data.chat_template import ChatTemplate
from potstill.data.corpus import Corpus
from potstill.data.cross_tokenizer.chat_translation import ChatMarkers, translate_chat
from potstill.data.cross_tokenizer.packs import TokenizerInfo, inspect_tokenizers, translate_windows
from potstill.data.cross_tokenizer.token_spans import decode_with_spans
from potstill.data.tokenize import compute_label_mask, label_tokens, tokenize_corpus
from potstill.data.turns import Message
from potstill.data.windows import cut_windows
from potstill.models.tokenizers.token_bytes import read_token_bytes

Make = Callable[..., PreTrainedTokenizerFast]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|start|>system\nBe brief<|eot|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|eot|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)  # a system message of its own, as SmolLM2 has one
FOLDED = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|start|>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' + (first if loop.first else '') }}"
    "{{ message['content'] | trim + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}"
)  # Gemma's manner: a system message opens what the user says first
BRACKETS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)  # Llama 2's
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA, "marked": MARKED, "gemma": FOLDED, "llama 2": BRACKETS}
CHATS = {
    "one answer": chat("Hi", "Hello."),
    "several": chat("Hi", "Hello, 世界!", "And\n\nthen?", "Bye"),
    "a system message": chat("Hi", "Hello", "More", "No", system="Be kind"),
}


def marks_of(tokenizer: PreTrainedTokenizerFast) -> ChatMarkers:
    marks = ChatMarkers.from_template(tokenizer, read_token_bytes(tokenizer))
    assert marks is not None
    return marks


def reader(tokenizer: PreTrainedTokenizerFast) -> TokenizerInfo:
    found = TokenizerInfo.from_tokenizer(tokenizer)
    return found._replace(
        chat_markers=ChatMarkers.from_template(tokenizer, found.pieces) or ChatMarkers.from_plain_tokenizer(tokenizer)
    )


def window(messages: list[Message], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """A chat's ids and labels, as `data.chat` makes them."""
    drawn = ChatTemplate(tokenizer).render_answers(messages)[-1]
    encoded = tokenizer(drawn.text, add_special_tokens=False, return_offsets_mapping=True)
    row = label_tokens(encoded.input_ids, compute_label_mask(drawn.spans, encoded.offset_mapping), None)
    return torch.tensor(row.input_ids), torch.tensor(row.labels)


@pytest.mark.parametrize("messages", CHATS.values(), ids=list(CHATS))
@pytest.mark.parametrize(("student", "teacher"), list(product(TEMPLATES, TEMPLATES)))
def test_a_chat_is_told_as_the_other_template_itself_writes_it(
    bytes_with: Make, student: str, teacher: str, messages: list[Message]
) -> None:
    ours, theirs = bytes_with(TEMPLATES[student]), bytes_with(TEMPLATES[teacher])
    if messages[0]["role"] == "system" and (student in ("gemma", "llama 2") or teacher == "llama 2"):
        messages = messages[1:]  # has no such role, or makes it the user's words
    data = ChatTemplate(ours).render(messages).encode()
    assert translate_chat(data, marks_of(ours), marks_of(theirs)).text == ChatTemplate(theirs).render(messages)


def test_a_system_message_that_a_template_has_no_place_for_opens_what_the_user_says(bytes_with: Make) -> None:
    ours, theirs = bytes_with(LLAMA), bytes_with(BRACKETS)
    data = ChatTemplate(ours).render(CHATS["a system message"]).encode()
    told = translate_chat(data, marks_of(ours), marks_of(theirs)).text
    assert told.startswith("<|bos|>[INST] Be kind\n\nHi [/INST] Hello <|eos|>")


@pytest.mark.parametrize(("student", "teacher"), [("chatml", "gemma"), ("gemma", "chatml"), ("llama 2", "llama 3")])
@pytest.mark.parametrize("begins", [0, 1, 9, 25, 40])
@pytest.mark.parametrize("behind", [1, 2, 7, 19, 200])
def test_of_any_window_only_equal_bytes_are_paired_and_what_the_student_learns_is_learnt(
    bytes_with: Make, student: str, teacher: str, begins: int, behind: int
) -> None:
    ours, theirs = reader(bytes_with(TEMPLATES[student])), reader(bytes_with(TEMPLATES[teacher]))
    assert ours.chat_markers is not None
    assert theirs.chat_markers is not None
    ids, labels = (one[begins : begins + behind] for one in window(chat("Hi", "naïve", "世界", "ok?"), ours.tokenizer))
    (found,) = translate_windows([(ids, labels)], ours, theirs)
    ends = ours.tokenizer.convert_tokens_to_ids(ours.chat_markers.ending)
    for mine, yours in found.equal_tokens.tolist():
        if int(ids[mine]) != ends:
            assert ours.pieces.by_id[int(ids[mine])] == theirs.pieces.by_id[int(found.input_ids[yours])]
    taught, learnt = ([int(i) for i in one[1:] if i != IGNORE] for one in (labels, found.labels))
    known = [
        ours.pieces.by_id[i] for i in taught if i != ends and ours.pieces.by_id[i] != b" "
    ]  # Llama 2's marks hold some
    told = [theirs.pieces.by_id[i] for i in learnt if i not in theirs.pieces.special_ids]
    assert told == [one for one in known if one in told] or b"?" in told  # half a character
    assert len(told) >= len(known) - 1  # of a window that is cut within an answer, a first token has nothing before it


@pytest.mark.parametrize(("student", "teacher"), list(product(("chatml", "marked", "llama 3"), ("gemma", "llama 3"))))
def test_every_answer_ends_for_the_teacher_where_it_ends_for_the_student(
    bytes_with: Make, student: str, teacher: str
) -> None:
    ours, theirs = reader(bytes_with(TEMPLATES[student])), reader(bytes_with(TEMPLATES[teacher]))
    assert ours.chat_markers is not None
    assert theirs.chat_markers is not None
    ids, labels = window(chat("Hi", "Hello.", "And?", "Bye."), ours.tokenizer)
    (found,) = translate_windows([(ids, labels)], ours, theirs)
    words = [ours.tokenizer.convert_ids_to_tokens(int(ids[i])) for i in found.equal_tokens[:, 0] if labels[i] != IGNORE]
    others = [theirs.tokenizer.convert_ids_to_tokens(int(i)) for i in found.labels if i != IGNORE]
    assert words == [*"Hello.", ours.chat_markers.ending, *"Bye.", ours.chat_markers.ending]
    assert others == [*"Hello.", theirs.chat_markers.ending, *"Bye.", theirs.chat_markers.ending]


def test_a_teacher_without_a_template_reads_line_by_line_and_ends_with_its_end_of_text(bytes_with: Make) -> None:
    ours, theirs = reader(bytes_with(CHATML)), reader(bytes_with(adds_bos=True))
    ids, labels = window(chat("Hi", "Hello"), ours.tokenizer)
    (found,) = translate_windows([(ids, labels)], ours, theirs)
    assert theirs.tokenizer.decode(found.input_ids) == "<|bos|>Hi\nHello<|eos|>"
    assert theirs.tokenizer.decode(found.labels[found.labels != IGNORE]) == "Hello<|eos|>"
    assert found.equal_tokens[:, 0][-1] == (labels != IGNORE).nonzero()[-1, 0]


def test_an_end_of_text_that_belongs_to_no_mark_still_ends_what_was_written(bytes_with: Make) -> None:
    ours, theirs = reader(bytes_with(CHATML)), reader(bytes_with(FOLDED))
    ids, labels = window(chat("Hi", "Hello"), ours.tokenizer)
    end = torch.tensor([ours.tokenizer.eos_token_id])
    ids, labels = torch.cat([ids[:-2], end]), torch.cat([labels[:-2], end])  # in place of the stop and its line break
    (found,) = translate_windows([(ids, labels)], ours, theirs)
    assert int(found.labels[-1]) == theirs.tokenizer.eos_token_id
    assert found.equal_tokens[-1].tolist() == [len(ids) - 1, len(found.input_ids) - 1]


def test_a_template_that_rewrites_turns_is_learnt_from_a_chat_of_one_answer(bytes_with: Make) -> None:
    ours, theirs = bytes_with(CHATML), bytes_with(THINKING)
    messages = chat("Hi", "Hello")
    data = ChatTemplate(ours).render(messages).encode()
    assert translate_chat(data, marks_of(ours), marks_of(theirs)).text == ChatTemplate(theirs).render(messages)


def test_without_a_template_there_are_no_marks_to_learn(bytes_with: Make) -> None:
    tokenizer = bytes_with()
    assert ChatMarkers.from_template(tokenizer, read_token_bytes(tokenizer)) is None


def test_a_template_of_which_nothing_can_be_learnt_is_known_as_one(bytes_with: Make) -> None:
    found = {
        template: ChatMarkers.has_unknown_template(one, read_token_bytes(one))
        for template in (None, CHATML, "{{ messages | length }}")
        for one in [bytes_with(template)]
    }
    assert found == {None: False, CHATML: False, "{{ messages | length }}": True}


def test_readers_are_made_once_and_a_base_teacher_reads_chats_line_by_line(bytes_with: Make) -> None:
    ours, theirs = bytes_with(CHATML), bytes_with()
    student, teacher = inspect_tokenizers(ours, theirs, chats=True)
    assert student.chat_markers is not None
    assert teacher.chat_markers is not None
    assert teacher.chat_markers.get_text("user", "assistant") == "\n"
    assert inspect_tokenizers(ours, theirs, chats=True)[1] is teacher
    assert [one.chat_markers for one in inspect_tokenizers(ours, theirs, chats=False)] == [None, None]


def test_special_tokens_are_read_back_only_where_they_are_asked_for(bytes_with: Make) -> None:
    tokenizer = bytes_with()
    known, ids = read_token_bytes(tokenizer), tokenizer("<|start|>Hi<|eot|>", add_special_tokens=False).input_ids
    assert decode_with_spans(ids, known)[0] == b"Hi"
    assert decode_with_spans(ids, known, visible_ids=known.special_ids)[0] == b"<|start|>Hi<|eot|>"


def told(bytes_with: Make, student: str, teacher: str, window: str) -> str:
    ours, theirs = bytes_with(student), bytes_with(teacher)
    return translate_chat(window.encode(), marks_of(ours), marks_of(theirs)).text


def test_a_break_within_an_answer_is_no_end_of_a_system_message(bytes_with: Make) -> None:
    found = told(bytes_with, FOLDED, CHATML, "ne.\n\nTwo.\n\nThree.<|end|>\n")
    assert found == "ne.\n\nTwo.\n\nThree.<|eot|>\n"


def test_a_window_that_begins_within_a_prompt_is_the_users(bytes_with: Make) -> None:
    found = told(bytes_with, CHATML, FOLDED, "three four<|eot|>\n<|start|>assistant\nThe answer.<|eot|>\n")
    assert found == "three four<|end|>\n<|start|>model\nThe answer.<|end|>\n"


def test_a_window_that_begins_or_ends_within_a_mark_shows_the_teacher_no_token_of_it(bytes_with: Make) -> None:
    assert told(bytes_with, CHATML, FOLDED, "<|start|>assistant\nHello.") == "Hello."
    assert told(bytes_with, CHATML, FOLDED, "Hello.<|eot|>\n<|start|>") == "Hello.<|end|>\n"
    assert "<|start|>assi" not in told(
        bytes_with, CHATML, FOLDED, "<|start|>system\nBe brief<|eot|>\n<|start|>user\nHi<|eot|>\n<|start|>assi"
    )


@pytest.mark.parametrize(("student", "teacher"), [("chatml", "gemma"), ("gemma", "llama 3"), ("llama 3", "chatml")])
def test_a_window_of_a_long_chat_is_told_as_a_shorter_chat(bytes_with: Make, student: str, teacher: str) -> None:
    ours, theirs = bytes_with(TEMPLATES[student]), bytes_with(TEMPLATES[teacher])
    messages = [{"role": role, "content": f"{role} {n}"} for n in range(4) for role in ("user", "assistant")]
    corpus = Corpus("chats", "chat", Dataset.from_list([{"messages": messages}]), None, None, {})
    (row,) = tokenize_corpus(corpus, ours)
    last = cut_windows(row, length=len(row.input_ids) * 2 // 3)[-1].input_ids.tolist()
    data, _ = decode_with_spans(last, read_token_bytes(ours), visible_ids=read_token_bytes(ours).special_ids)
    count = data.count(b"assistant ")
    assert 1 < count < 4
    shorter = ChatTemplate(theirs).render(messages[-2 * count :])
    assert translate_chat(data, marks_of(ours), marks_of(theirs)).text.strip() == shorter.strip()


def test_a_bos_before_a_further_window_is_no_text(bytes_with: Make) -> None:
    ours, theirs = bytes_with(LLAMA, adds_bos=True), bytes_with(CHATML)
    data = b"<|bos|>one paragraph\n\nand another<|eot|>"
    assert translate_chat(data, marks_of(ours), marks_of(theirs)).text == "one paragraph\n\nand another<|eot|>\n"


LINES = (
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)


def test_an_ending_that_is_text_ends_an_answer_only_where_nothing_follows(bytes_with: Make) -> None:
    answer = "First.\n\nSecond.\n\nThird."
    window = f"### user:\nHi\n\n### assistant:\n{answer}\n\n"
    assert told(bytes_with, LINES, FOLDED, window) == (
        f"<|bos|><|start|>user\nHi<|end|>\n<|start|>model\n{answer}<|end|>\n"
    )


def test_thinking_is_told_in_the_last_answer_alone(bytes_with: Make) -> None:
    messages = chat("Hi", "Hello", "And?", "Bye")
    data = ChatTemplate(bytes_with(CHATML)).render(messages)
    assert told(bytes_with, CHATML, THINKING, data) == ChatTemplate(bytes_with(THINKING)).render(messages)


def test_a_tokenizer_that_ends_every_text_itself_ends_it_once(bytes_with: Make) -> None:
    ours, theirs = bytes_with(), bytes_with(adds_bos=True, adds_eos=True)
    sides = [TokenizerInfo.from_tokenizer(one) for one in (ours, theirs)]
    ids = torch.tensor([*ours("Hi", add_special_tokens=False).input_ids, ours.eos_token_id])
    (found,) = translate_windows([(ids, ids)], *sides)
    assert theirs.decode(found.input_ids) == "<|bos|>Hi<|eos|>"
    (cut,) = translate_windows([(ids[:-1], ids[:-1])], *sides)
    assert theirs.decode(cut.input_ids) == "<|bos|>Hi"


def test_the_space_that_a_tokenizer_puts_in_front_is_not_told() -> None:
    ours, theirs = (TokenizerInfo.from_tokenizer(one) for one in (sentencepiece(), byte_level()))
    ids = torch.tensor(ours.tokenizer("The other", add_special_tokens=False).input_ids)
    (found,) = translate_windows([(ids, ids)], ours, theirs)
    assert theirs.tokenizer.decode(found.input_ids) == "The other"
