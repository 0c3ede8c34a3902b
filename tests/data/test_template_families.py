"""What is trained under templates of the structure that families of models have: answers, end tokens, thoughts, calls.

The templates are written for these tests. Each is named after the family whose structure it has.
"""

import datetime
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import DataError
from potstill.data.chat_template import ChatTemplate, count_lost_thinking
from potstill.data.turns import Message
from potstill.decode.stop_tokens import list_stop_tokens
from potstill.models.tokenizers.chat_renderer import fix_date, uses_date

Make = Callable[..., PreTrainedTokenizerFast]

USER = "{% if m.role != 'assistant' %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (  # earlier thoughts are dropped, and the last answer has at least an empty one
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = (  # the prompt opens a thought, and an answer is written without it
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}"
    "<|assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
HARMONY = (  # the last answer ends with another token than earlier ones, a call with a third
    "{% for m in messages %}{% if m.role != 'assistant' %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
    "{% elif m.tool_calls %}<|start|>assistant to={{ m.tool_calls[0].function.name }}<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}<|start|>assistant"
    "{% if m.thinking and loop.last %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant"
    "{% endif %}"
    "<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
MARKED = (  # the block holds the line break behind the end token
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
    "'<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TWO_ENDS = CHATML.replace("<|im_end|>\n", "{{ '<|im_end|>' + (eos_token if m.role == 'assistant' else '') }}\n")
PARTS = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part['text'] }}{% endfor %}")
OBJECT_CALLS = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
DEEPSEEK = CHATML.replace(  # joins strings, so that arguments must be JSON; writes calls without content only
    OBJECT_CALLS,
    "{% if m.content is none %}{{ m.tool_calls[0].function.name + m.tool_calls[0].function.arguments }}{% endif %}",
).replace("{{ m.content }}", "{{ m.content or '' }}")


class Family(NamedTuple):
    """A template, its end-of-text token, the end tokens, and the trained texts of each of the `CHATS`."""

    template: str
    eos: str
    ends: list[str]
    one: list[list[str]]
    two: list[list[str]]
    thinking: list[list[str]]
    lost: int


CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
HI, AND = {"role": "user", "content": "Hi"}, {"role": "user", "content": "And?"}


def answer(content: str, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


THOUGHT = dict.fromkeys(("reasoning_content", "thinking", "reasoning"), "hm")
ONE: list[Message] = [HI, answer("Hello")]
TWO: list[Message] = [HI, answer("Hello"), AND, answer("Bye\n")]
THINKING: list[Message] = [HI, answer("Hello", **THOUGHT), AND, answer("Bye", **THOUGHT)]

PLAIN_CHATML = [["Hello<|im_end|>"]], [["Hello<|im_end|>", "Bye\n<|im_end|>"]], [["Hello<|im_end|>", "Bye<|im_end|>"]]
FAMILIES = {
    "ChatML of a base model": Family(CHATML, "<|endoftext|>", ["<|im_end|>"], *PLAIN_CHATML, 2),
    "Gemma": Family(
        GEMMA,
        "<eos>",
        ["<end_of_turn>"],
        [["Hello<end_of_turn>"]],
        [["Hello<end_of_turn>", "Bye<end_of_turn>"]],
        [["Hello<end_of_turn>", "Bye<end_of_turn>"]],
        2,
    ),
    "Mistral": Family(
        MISTRAL, "</s>", ["</s>"], [[" Hello</s>"]], [[" Hello</s>", " Bye\n</s>"]], [[" Hello</s>", " Bye</s>"]], 2
    ),
    "Phi": Family(
        PHI,
        "<|endoftext|>",
        ["<|end|>", "<|endoftext|>"],
        [["Hello<|end|>\n<|endoftext|>"]],
        [["Hello<|end|>", "Bye\n<|end|>\n<|endoftext|>"]],
        [["Hello<|end|>", "Bye<|end|>\n<|endoftext|>"]],
        2,
    ),
    "two end tokens": Family(
        TWO_ENDS,
        "<|eos|>",
        ["<|im_end|>", "<|eos|>"],
        [["Hello<|im_end|><|eos|>"]],
        [["Hello<|im_end|><|eos|>", "Bye\n<|im_end|><|eos|>"]],
        [["Hello<|im_end|><|eos|>", "Bye<|im_end|><|eos|>"]],
        2,
    ),
    "Qwen 3": Family(
        QWEN3,
        "<|im_end|>",
        ["<|im_end|>"],
        [["<think>\n\n</think>\n\nHello<|im_end|>"]],
        [["<think>\n\n</think>\n\nHello<|im_end|>"], ["<think>\n\n</think>\n\nBye\n<|im_end|>"]],
        [["<think>\nhm\n</think>\n\nHello<|im_end|>"], ["<think>\nhm\n</think>\n\nBye<|im_end|>"]],
        0,
    ),
    "R1-Distill": Family(
        R1,
        "<|eos|>",
        ["<|eos|>"],
        [["Hello<|eos|>"]],
        [["Hello<|eos|>", "Bye\n<|eos|>"]],
        [["Hello<|eos|>", "Bye<|eos|>"]],
        2,
    ),
    "gpt-oss": Family(
        HARMONY,
        "<|return|>",
        ["<|return|>", "<|call|>"],
        [["<|channel|>final<|message|>Hello<|return|>"]],
        [["<|channel|>final<|message|>Hello<|return|>"], ["<|channel|>final<|message|>Bye\n<|return|>"]],
        [
            [f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>{text}<|return|>"]
            for text in ("Hello", "Bye")
        ],
        0,
    ),
    "a block with the line break": Family(MARKED, "<|endoftext|>", ["<|im_end|>"], *PLAIN_CHATML, 2),
    "content in parts": Family(PARTS, "<|endoftext|>", ["<|im_end|>"], *PLAIN_CHATML, 2),
}
SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<eos>", "<start_of_turn>", "<end_of_turn>", "</s>"),
    *("<|end|>", "<|user|>", "<|assistant|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>", "<|start|>"),
)


def train(template: ChatTemplate, messages: list[Message], **options: Any) -> list[list[str]]:
    """The trained texts of each rendering of a chat."""
    rendered = template.render_answers(messages, **options)
    return [[text[start:stop] for start, stop in spans] for text, spans in rendered]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_answers_are_trained_with_their_end_tokens_and_nothing_behind_them(
    family: Family, bytes_with: Make, tiny_llama: LlamaForCausalLM
) -> None:
    tokenizer = bytes_with(family.template, more=SPECIALS, eos=family.eos)
    template = ChatTemplate(tokenizer)
    assert train(template, ONE) == family.one
    assert train(template, TWO) == family.two
    assert train(template, THINKING) == family.thinking
    assert count_lost_thinking(THINKING, template.render_answers(THINKING)) == family.lost
    assert train(template, TWO, only_last=True) == [family.two[-1][-1:]]
    tiny_llama.generation_config.eos_token_id = [250]
    ends = [250, *dict.fromkeys([tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(family.ends)])]
    assert list_stop_tokens(tiny_llama, tokenizer) == ends


def test_an_answer_trained_alone_follows_its_own_prompt(bytes_with: Make) -> None:
    template = ChatTemplate(bytes_with(QWEN3, more=SPECIALS, eos="<|im_end|>"))
    for i, rendered in zip((1, 3), template.render_answers(THINKING), strict=True):
        (span,) = rendered.spans
        assert rendered.text[: span[0]] == template.render(THINKING[:i], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("source", "call"),
    [
        (CHATML, '<tool_call>{"name": "clock", "arguments": {"zone": "UTC"}}</tool_call><|im_end|>'),
        (DEEPSEEK, 'clock{"zone": "UTC"}<|im_end|>'),
        (HARMONY, ' to=clock<|message|>{"zone": "UTC"}<|call|>'),
    ],
    ids=["ChatML", "DeepSeek", "gpt-oss"],
)
def test_a_tool_call_is_trained_as_the_template_writes_it(bytes_with: Make, source: str, call: str) -> None:
    messages = [HI, answer("", tool_calls=[CALL]), {"role": "tool", "content": "12"}, answer("Noon")]
    texts = train(ChatTemplate(bytes_with(source, more=SPECIALS)), messages, tools=[CALL])
    assert texts[0][0] == call


def test_a_template_that_writes_no_tool_calls_refuses_them(bytes_with: Make) -> None:
    with pytest.raises(DataError, match="writes no tool calls; give one that does with --chat-template"):
        ChatTemplate(bytes_with(GEMMA, more=SPECIALS)).render_answers([HI, answer("", tool_calls=[CALL])])


def test_of_several_named_templates_default_is_used_and_tool_use_where_tools_are(bytes_with: Make) -> None:
    tokenizer = bytes_with({"default": GEMMA, "tool_use": CHATML}, more=SPECIALS)
    template = ChatTemplate(tokenizer)
    assert train(template, ONE) == [["Hello<end_of_turn>"]]
    calls = [HI, answer("", tool_calls=[CALL])]
    assert train(template, calls, tools=[CALL])[0][0].startswith("<tool_call>")
    with pytest.raises(DataError, match="a, b and none called default"):
        ChatTemplate(bytes_with({"a": GEMMA, "b": CHATML}))


def test_a_developer_is_a_system_message_where_the_template_does_not_name_one(bytes_with: Make) -> None:
    messages = [{"role": "developer", "content": "Be kind"}, *ONE]
    assert "<|im_start|>system\nBe kind" in ChatTemplate(bytes_with(CHATML)).render(messages)
    named = CHATML + "{# developer #}"
    assert "<|im_start|>developer\nBe kind" in ChatTemplate(bytes_with(named)).render(messages)


def test_an_answer_of_weight_0_is_not_trained_on(bytes_with: Make) -> None:
    messages = [HI, answer("Hello", weight=0), AND, answer("Bye")]
    for source in (CHATML, MARKED):
        assert train(ChatTemplate(bytes_with(source, more=SPECIALS)), messages) == [["Bye<|im_end|>"]]


def test_the_date_of_a_template_is_the_fixed_one(bytes_with: Make) -> None:
    dated = "Today: {{ strftime_now('%d %b %Y') }}\n" + CHATML
    tokenizer = bytes_with(dated, more=SPECIALS)
    assert uses_date(tokenizer)
    assert not uses_date(bytes_with(CHATML))
    today = datetime.date.today().strftime("Today: %d %b %Y\n")
    assert ChatTemplate(tokenizer).render(ONE).startswith(today)
    fix_date(tokenizer, datetime.date(2024, 7, 26))
    assert ChatTemplate(tokenizer).render(ONE).startswith("Today: 26 Jul 2024\n<|im_start|>")


@pytest.mark.parametrize(
    ("line", "date"),
    [
        ("{{ 'On ' -}}{%- set day = strftime_now('%d %b %Y') -%}{{ day }}", "On 06 Jul 2024"),  # quotes on one line
        ("{% set form = '%Y' + '-%m' %}{{ strftime_now(form) }}", "2024-07"),
        ('{{ strftime_now("%-d.%-m.%y") }}', "6.7.24"),
    ],
)
def test_a_fixed_date_is_written_in_any_format(bytes_with: Make, line: str, date: str) -> None:
    for body in (CHATML, MARKED):
        tokenizer = bytes_with(line + body, more=SPECIALS)
        fix_date(tokenizer, datetime.date(2024, 7, 6))
        assert ChatTemplate(tokenizer).render(ONE).startswith(f"{date}<|")
