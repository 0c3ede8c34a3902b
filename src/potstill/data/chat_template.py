"""Finds the characters of a rendered chat that are the assistant's answers, with their stop tokens.

Templates with `{% generation %}` mark them. For all others, turn i begins at the end of the chat before it, rendered
with the generation prompt. It ends at the end of the chat up to it. Text that the template writes after the stop token,
often a line break, is excluded, since a model generates nothing after a stop token.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello.<|im_end|>\\n
                                                           ^^^^^^^^^^^^^^^^^^
"""

import re
from collections.abc import Mapping, Sequence

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from potstill.core.errors import DataError

Message = Mapping[str, str]
Span = tuple[int, int]

PROBE_TEXT = "potstill"  # the content of a chat rendered to find the stop string
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A tokenizer's chat template, and `stop`, the string with which it ends an answer.

    Raises: DataError if there is no template, or it does not write the assistant's answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template, which chats "
                f"need; add one, or convert the chats to prompt and response"
            )
        self.tokenizer = tokenizer
        self.source: str = tokenizer.get_chat_template()
        self.has_generation_tags = bool(GENERATION_TAG.search(self.source))
        self.stop = self._find_stop()

    def _find_stop(self) -> str:
        """The text after an answer up to its first special token, or all of it if there is no special token."""
        rendered = self.render([{"role": "user", "content": PROBE_TEXT}, {"role": "assistant", "content": PROBE_TEXT}])
        if PROBE_TEXT not in rendered:
            raise DataError("the chat template does not write the assistant's answers; correct it or use another")
        tail = rendered[rendered.rindex(PROBE_TEXT) + len(PROBE_TEXT) :]
        added_tokens = self.tokenizer.added_tokens_decoder.values()
        special_tokens = {token.content for token in added_tokens if token.special} | set(
            self.tokenizer.all_special_tokens
        )
        ends = [tail.index(token) + len(token) for token in special_tokens if token in tail]
        return tail[: min(ends)] if ends else tail

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The chat as text; with `add_generation_prompt`, up to where the next answer begins.

        Raises: DataError if the template refuses the chat.
        """
        return self._apply(messages, add_generation_prompt=add_generation_prompt)[0]

    def _apply(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self.source,
                return_assistant_tokens_mask=self.has_generation_tags and not add_generation_prompt,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"the chat template refuses the roles {_list_roles(messages)}: {error}") from error
        return texts[0], [(int(start), int(stop)) for start, stop in spans[0]] if spans else []

    def render_with_spans(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The rendered chat, and the spans of characters of the assistant's answers, stop strings included.

        Raises: DataError if the template refuses the chat, or renders earlier turns differently once others follow.
        """
        text, generation_spans = self._apply(messages)
        if self.has_generation_tags:
            return text, [self._extend_to_stop(text, span) for span in generation_spans]
        answer_indices = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._find_turn(text, messages, i) for i in answer_indices]

    def _extend_to_stop(self, text: str, span: Span) -> Span:
        """The span with the stop string after it: `{% generation %}` often ends before it, and it must be learned."""
        start, stop = span
        has_stop = self.stop and text.startswith(self.stop, stop)
        return start, stop + len(self.stop) if has_stop else stop

    def _find_turn(self, text: str, messages: Sequence[Message], i: int) -> Span:
        prefix = self.render(messages[:i], add_generation_prompt=True)
        prefix_with_turn = self.render(messages[: i + 1])
        start = len(prefix)
        if text.startswith(prefix) and text.startswith(prefix_with_turn) and len(prefix_with_turn) > start:
            stop = text.rfind(self.stop, start, len(prefix_with_turn)) if self.stop else len(prefix_with_turn)
            return start, stop + len(self.stop) if stop >= 0 else len(prefix_with_turn)
        # Qwen 3 renders a turn with its thinking only while it is the last turn.
        content = messages[i]["content"].strip()
        if text.startswith(prefix) and self.stop and text.startswith(content + self.stop, start):
            return start, start + len(content + self.stop)
        raise DataError(
            f"the chat template changes turn {i + 1} of {len(messages)} once others follow, so the answer cannot be "
            f"located; use a template with {{% generation %}}, or chats of one answer"
        )


def _list_roles(messages: Sequence[Message]) -> str:
    return ", ".join(message["role"] for message in messages) or "of an empty chat"
