"""Finds the characters of a rendered chat that are the assistant's answers, with their end tokens.

Templates with `{% generation %}` mark them. For all others, each answer is rendered as the last turn of its chat:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello.<|im_end|>\\n
                                                           ^^^^^^^^^^^^^^^^^^

It begins where the chat before it ends, rendered with the generation prompt. Some templates open a thought there that
the answer does not have; then the answer begins where the two texts part, after its header. It ends with the end tokens
of the template (`models.tokenizers.chat_renderer`). What the template writes after them is not trained on, since a
model generates nothing after an end token.

Answers that the whole chat renders the same way are trained in one text. A template may change a turn once others
follow, for example drop its thinking; such an answer is trained in a text of its own, after its own rendered prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from potstill.core.errors import DataError
from potstill.data.thinking import THINKING_END
from potstill.data.turns import THINKING_NAMES, is_trained
from potstill.models.tokenizers.chat_renderer import PROBE_TEXT, ChatRenderer, Message, Span


class RenderedChat(NamedTuple):
    """A text and the spans of characters in it that are trained on."""

    text: str
    spans: list[Span]


class _Answer(NamedTuple):
    """An answer as the last turn of its chat, and its span."""

    text: str
    start: int
    stop: int


class ChatTemplate(ChatRenderer):
    """A tokenizer's chat template, which renders chats and finds the answers in them.

    Raises: DataError if there is no template, or it does not write the assistant's answers.
    """

    def render_answers(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, only_last: bool = False
    ) -> list[RenderedChat]:
        """The texts in which the answers of a chat are trained, at least one; with `only_last`, the last answer's.

        Raises: DataError if the template refuses the chat.
        """
        text, tags = self.render_with_tags(messages, tools=tools)
        source = self.tool_source if tools else self.source
        if self.has_generation_tags(source):
            spans = _select_tags(_merge_spans([self._fit_tag(text, span) for span in tags]), messages)
            start = self._find_last_answer(text, messages, tools) if only_last else 0
            return [RenderedChat(text, [span for span in spans if span[1] > start])]
        indices = [i for i, message in enumerate(messages) if is_trained(message)]
        shared_spans, own_texts = [], []
        for i in indices[-1:] if only_last else indices:
            answer = self._find_answer(messages, i, tools, text)
            stop = self._find_stop_in_chat(text, answer)
            if stop is None:
                own_texts.append(RenderedChat(answer.text, [(answer.start, answer.stop)]))
            else:
                shared_spans.append((answer.start, stop))
        return [*own_texts, *([RenderedChat(text, shared_spans)] if shared_spans or not own_texts else [])]

    def _fit_tag(self, text: str, span: Span) -> Span:
        """The span that ends with the end tokens.

        `{% generation %}` often ends before them, and they must be learned; or after a line break that follows them.
        """
        start, stop = span
        for ending in (self.stop, self.first_stop):
            position = text.rfind(ending, start, stop + len(ending)) if ending else -1
            end = position + len(ending)
            if position >= 0 and not text[end:stop].strip():
                return start, end
        stripped = text[start:stop].rstrip()
        ends_with_token = any(match.end() == len(stripped) for match in self.special_token.finditer(stripped))
        return (start, start + len(stripped)) if ends_with_token else span

    def _find_last_answer(self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None) -> int:
        """Where the header of the last answer begins in the text of the whole chat, or up to it."""
        last = max(i for i, message in enumerate(messages) if is_trained(message))
        return _count_shared(text, self.render(messages[:last], tools=tools, add_generation_prompt=True))

    def _find_answer(self, messages: Sequence[Message], i: int, tools: Sequence[Any] | None, whole: str) -> _Answer:
        """Answer `i` of a chat whose text is `whole`."""
        text = whole if i + 1 == len(messages) else self.render(messages[: i + 1], tools=tools)
        try:
            prompt: str | None = self.render(messages[:i], tools=tools, add_generation_prompt=True)
        except DataError:  # some templates refuse a prompt without a user
            prompt = None
        if prompt is not None and text.startswith(prompt):
            start = len(prompt)
        else:
            start = self._find_header_end(messages, i, tools)
            start = start if prompt is None else min(start, _count_shared(text, prompt))
        return _Answer(text, start, self._find_end(text, start))

    def _find_header_end(self, messages: Sequence[Message], i: int, tools: Sequence[Any] | None) -> int:
        """Where the text of answer `i` begins: where the renderings of two other answers part."""
        texts = [
            self.render([*messages[:i], {"role": "assistant", "content": content}], tools=tools)
            for content in (PROBE_TEXT, PROBE_TEXT[::-1])
        ]
        return _count_shared(*texts)

    def _find_end(self, text: str, start: int) -> int:
        """Where the last answer in `text` ends, which begins at `start`: with the end tokens, if it has any."""
        for ending in (self.stop, self.first_stop):
            position = text.rfind(ending, start) if ending else -1
            if position >= 0:
                return position + len(ending)
        tokens = list(self.special_token.finditer(text, start))
        has_end_token = bool(tokens) and not text[tokens[-1].end() :].strip()
        return tokens[-1].end() if has_end_token else len(text)

    def _find_stop_in_chat(self, text: str, answer: _Answer) -> int | None:
        """Where `answer` ends in the text of the whole chat; None if that text differs from its own."""
        if text.startswith(answer.text[: answer.stop]):
            return answer.stop
        stop = answer.stop - len(self.stop) + len(self.first_stop)
        ends_with_stop = answer.text.startswith(self.stop, answer.stop - len(self.stop))
        return stop if ends_with_stop and stop < answer.stop and text.startswith(answer.text[:stop]) else None


def _count_shared(first: str, second: str) -> int:
    """The number of characters with which both texts begin."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _merge_spans(spans: Sequence[Span]) -> list[Span]:
    """The spans in ascending order, without empty ones, and those that overlap or touch as one."""
    merged: list[Span] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _select_tags(tags: Sequence[Span], messages: Sequence[Message]) -> list[Span]:
    """The spans of `{% generation %}` in answers that are trained on.

    Raises: DataError if it is unknown which answers they are in.
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    if all(map(is_trained, answers)):
        return list(tags)
    if len(tags) != len(answers):
        raise DataError(
            f"the chat template marks {len(tags)} spans in {len(answers)} answers, so an answer of weight 0 cannot be "
            f"left out; correct its {{% generation %}}"
        )
    return [span for span, message in zip(tags, answers, strict=True) if is_trained(message)]


def count_lost_thinking(messages: Sequence[Message], texts: Sequence[RenderedChat]) -> int:
    """The number of answers whose thinking the template leaves out of all texts in which they are trained."""
    thoughts = [thought for message in messages if is_trained(message) for thought in _list_thoughts(message)]
    return sum(not any(thought in rendered.text for rendered in texts) for thought in thoughts)


def _list_thoughts(message: Mapping[str, Any]) -> list[str]:
    field = next((message[name] for name in THINKING_NAMES if message.get(name)), "")
    before, separator, _ = message["content"].rpartition(THINKING_END)
    in_content = before.rpartition("<think>")[2] if separator else ""
    return [thought.strip() for thought in (field, in_content) if thought.strip()]
