"""Tokenizes prompts: what stands before an answer, in the chat template where there is one."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill.data.chat_template import ChatTemplate
from potstill.data.control_tokens import ControlTokens, check_control_token_policy


class PromptTokenizer:
    """Renders prompts by the chat template of a tokenizer, or else as lines, and gives their token ids.

    `special_in_text` says what control tokens in a prompt's own text are: `keep` them, `escape` them to plain text, or
    `refuse` the prompt.

    Raises: UsageError for another policy; DataError with `needs_template` for a tokenizer without a chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        special_in_text: str = "keep",
        needs_template: bool = False,
    ) -> None:
        self.tokenizer, self.special_in_text = tokenizer, check_control_token_policy(special_in_text)
        self.template = ChatTemplate(tokenizer) if tokenizer.chat_template or needs_template else None
        self.control_tokens = ControlTokens(tokenizer)

    def encode(self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None) -> list[int]:
        """The ids of `messages` and of the words that open an answer; without a template each message is a line.

        Raises: DataError if the template refuses the chat, or for control tokens that are refused.
        """
        messages, count = self.control_tokens.mask_messages(messages, self.special_in_text)
        if self.template is None:
            text = "".join(message["content"] + "\n" for message in messages)
        else:
            text = self.template.render(messages, tools=tools, add_generation_prompt=True)
        return self._encode(text, count, add_special_tokens=self.template is None)

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text as it is, without a template.

        Raises: DataError for control tokens that are refused.
        """
        messages, count = self.control_tokens.mask_messages([{"role": "", "content": text}], self.special_in_text)
        return self._encode(messages[0]["content"], count, add_special_tokens=True)

    def _encode(self, text: str, count: int, *, add_special_tokens: bool) -> list[int]:
        if count and self.special_in_text == "escape":
            text = self.control_tokens.exchange(text)
            return self.control_tokens.encode(text, add_special_tokens=add_special_tokens)[0]
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
