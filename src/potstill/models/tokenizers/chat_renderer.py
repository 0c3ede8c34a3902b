"""Renders chats by a tokenizer's template, and finds the tokens with which the template ends an answer.

An answer ends with the first special token after its text. If the tokenizer's end-of-text token follows it, with no
more than line breaks and special tokens between, the answer ends with that token:

    Hello.<|im_end|>\\n            ends with <|im_end|>
    Hello.<|end|><|eos|>          ends with <|end|><|eos|>, if <|eos|> is the tokenizer's end of text
"""

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from potstill.core.errors import DataError

Message = Mapping[str, Any]
Span = tuple[int, int]

PROBE_TEXT = "potstill"  # the text of an answer that is rendered to see what the template writes after it
PROBE_CALL = {
    "id": "potstill1",  # Mistral's templates want nine letters
    "type": "function",
    "function": {"name": "potstill", "arguments": {"name": "potstill"}},
}
PROBE_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE_FUNCTION = "strftime_now"  # through which Hugging Face's templates read the date
DATE_DIRECTIVES = "aAbBcdDeFGhHIjmMpSTuUVwWxXyYzZ"  # letters that follow a % in its argument
DATE_ATTRIBUTE = "potstill_date"  # of a tokenizer whose chats have a fixed date
RENDER_ERRORS = (TemplateError, TypeError, LookupError, AttributeError, ValueError)


def fix_date(tokenizer: PreTrainedTokenizerBase, date: datetime.date) -> None:
    """Makes `date` the date that the template of this tokenizer writes, whatever the day. It is not saved."""
    setattr(tokenizer, DATE_ATTRIBUTE, date)


def get_date(tokenizer: PreTrainedTokenizerBase) -> datetime.date:
    """The date that the template of this tokenizer writes: the fixed one, or today."""
    date: datetime.date = getattr(tokenizer, DATE_ATTRIBUTE, None) or datetime.date.today()
    return date


def uses_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template of this tokenizer writes the date."""
    return any(DATE_FUNCTION in source for source in list_templates(tokenizer).values())


def list_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The chat templates of a tokenizer by name; a single one is called `default`."""
    templates = tokenizer.chat_template
    return dict(templates) if isinstance(templates, Mapping) else {"default": templates} if templates else {}


def list_special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The strings of all special tokens."""
    added_tokens = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added_tokens if token.special} | set(tokenizer.all_special_tokens)


class CallStyle(NamedTuple):
    """How a template reads a message with tool calls: with no content or an empty one, arguments as object or JSON."""

    has_content: bool
    has_objects: bool

    def apply(self, message: Message) -> dict[str, Any]:
        """The message in this style."""
        if not message.get("tool_calls"):
            return dict(message)
        calls = [
            {**call, "function": {**call["function"], "arguments": self._write(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
        content = message["content"] if message["content"] or self.has_content else None
        return {**message, "content": content, "tool_calls": calls}

    def _write(self, arguments: Any) -> Any:
        return (
            arguments if self.has_objects or isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        )


CALL_STYLES = tuple(
    CallStyle(has_content, has_objects) for has_objects in (True, False) for has_content in (True, False)
)


class ChatRenderer:
    """A tokenizer's chat template. `stop` is the string with which it ends an answer, `end_tokens` the tokens in it.

    Of several named templates, `tool_use` renders chats with tools, and `default` all others. A template that reads a
    message's content as a list of parts gets one. The role developer becomes system where the template does not name
    it.

    Raises: DataError if there is no template, or it does not write the assistant's answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        templates = list_templates(tokenizer)
        if not templates:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template, which chats "
                f"need; give one with --chat-template, or convert the chats to prompt and response"
            )
        if "default" not in templates and len(templates) > 1:
            raise DataError(
                f"the tokenizer has the chat templates {', '.join(templates)} and none called default; give one with "
                f"--chat-template"
            )
        self.tokenizer = tokenizer
        self.source = templates.get("default", next(iter(templates.values())))
        self.tool_source = templates.get("tool_use", self.source)
        self.special_token = compile_names(list_special_tokens(tokenizer))
        self.has_content_parts = False
        self.stop = self._find_stop()

    @cached_property
    def _call_probe(self) -> tuple[CallStyle, str] | None:
        """How the template reads tool calls, and what it writes after one; None if it writes no tool calls."""
        question = {"role": "user", "content": "Hi"}
        for style in CALL_STYLES:
            call = style.apply({"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]})
            try:
                rendered = self._apply([question, call], self.tool_source, [PROBE_TOOL], add_generation_prompt=False)[0]
            except DataError:
                continue
            if rendered.count(PROBE_TEXT) > 1:
                return style, rendered.rpartition(PROBE_TEXT)[2]
        return None

    def _find_stop(self) -> str:
        """The text after an answer, as the module describes; all of it if it holds no special token."""
        question, answer = {"role": "user", "content": PROBE_TEXT}, {"role": "assistant", "content": PROBE_TEXT}
        for self.has_content_parts in (False, True):
            try:
                tail = self.render([question, answer]).split(PROBE_TEXT)
            except DataError:
                if self.has_content_parts:
                    raise
                continue
            if len(tail) > 2:
                return self._cut_tail(tail[-1])
        raise DataError("the chat template does not write the assistant's answers; correct it or use another")

    def _cut_tail(self, tail: str) -> str:
        """The text after an answer up to the end of its last end token."""
        pattern = self.special_token
        if not pattern.search(tail):  # an end token that was added without the mark `special`
            pattern = compile_names(token.content for token in self.tokenizer.added_tokens_decoder.values())
        matches = list(pattern.finditer(tail))
        for number, match in enumerate(matches):
            if number and tail[matches[number - 1].end() : match.start()].strip():
                break
            if match[0] == self.tokenizer.eos_token:
                return tail[: match.end()]
        return tail[: matches[0].end()] if matches else tail

    @cached_property
    def first_stop(self) -> str:
        """`stop` up to its first token: a template may write the others after the last answer of a chat alone."""
        match = self.special_token.search(self.stop)
        return self.stop[: match.end()] if match else self.stop

    @property
    def end_tokens(self) -> list[int]:
        """The ids of the tokens that end an answer or a tool call, in their order; empty without any."""
        tail = self._call_probe[1] if self._call_probe else self.stop
        call_ends = [] if self.stop in tail else self.special_token.findall(tail)[-1:]
        if call_ends and self._separates_calls(call_ends[0]):
            call_ends = []
        names = [*self.special_token.findall(self.stop), *call_ends] or [self.stop.strip()]
        ids = [self.tokenizer.convert_tokens_to_ids(name) for name in names]
        unknown = (None, self.tokenizer.unk_token_id)
        return [i for i, name in zip(ids, names, strict=True) if i not in unknown or name == self.tokenizer.unk_token]

    def _separates_calls(self, token: str) -> bool:
        """Whether a token ends each of two calls in one answer, and so does not end the answer."""
        texts = []
        for count in (1, 2):
            call = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL] * count}
            try:
                texts.append(self.render([{"role": "user", "content": "Hi"}, call], tools=[PROBE_TOOL]))
            except DataError:
                return False
        return texts[1].count(token) > texts[0].count(token)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The chat as text; with `add_generation_prompt`, up to where the next answer begins.

        Raises: DataError if the template refuses the chat.
        """
        return self.render_with_tags(messages, tools=tools, add_generation_prompt=add_generation_prompt)[0]

    def render_with_tags(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        """The chat as text, and the spans that `{% generation %}` marks in it; none without these tags.

        Raises: DataError if the template refuses the chat, or writes no tool calls and the chat has some.
        """
        prepared = [self._prepare_message(message) for message in messages]
        if any(message.get("tool_calls") for message in messages):
            if self._call_probe is None:
                raise DataError("the chat template writes no tool calls; give one that does with --chat-template")
            prepared = [self._call_probe[0].apply(message) for message in prepared]
        source = self.tool_source if tools else self.source
        return self._apply(prepared, source, tools, add_generation_prompt=add_generation_prompt)

    def _apply(
        self,
        messages: Sequence[Message],
        source: str,
        tools: Sequence[Any] | None,
        *,
        add_generation_prompt: bool,
    ) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                tools=list(tools) if tools else None,
                chat_template=_write_date(source, get_date(self.tokenizer)),
                return_assistant_tokens_mask=self.has_generation_tags(source) and not add_generation_prompt,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except RENDER_ERRORS as error:
            raise DataError(f"the chat template refuses the roles {_list_roles(messages)}: {error}") from error
        return texts[0], [(int(start), int(stop)) for start, stop in spans[0]] if spans else []

    def has_generation_tags(self, source: str) -> bool:
        """Whether a template marks the answers with `{% generation %}`."""
        return bool(GENERATION_TAG.search(source))

    def _prepare_message(self, message: Message) -> dict[str, Any]:
        prepared = {name: value for name, value in message.items() if name != "weight"}
        if message["role"] == "developer" and "developer" not in self.source:
            prepared["role"] = "system"
        if self.has_content_parts:
            prepared["content"] = [{"type": "text", "text": message["content"]}]
        return prepared


def compile_names(names: Iterable[str]) -> re.Pattern[str]:
    """The pattern that finds any of the names, the longest first; without names it finds nothing."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


@lru_cache(maxsize=8)
def _write_date(source: str, date: datetime.date) -> str:
    """The template with a macro in place of the function that tells today's date.

    The macro replaces each directive of its argument, such as `%d`, or `%-d` without leading zeros.
    """
    if DATE_FUNCTION not in source:
        return source
    texts = {letter: date.strftime(f"%{letter}") for letter in DATE_DIRECTIVES}
    values = {f"%-{letter}": text.lstrip("0") or "0" for letter, text in texts.items() if text.isdecimal()}
    values |= {f"%{letter}": text for letter, text in texts.items()}
    filters = "".join(f" | replace({json.dumps(name)}, {json.dumps(text)})" for name, text in values.items())
    return f"{{% macro {DATE_FUNCTION}(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{source}"


def _list_roles(messages: Sequence[Message]) -> str:
    return ", ".join(message["role"] for message in messages) or "of an empty chat"
