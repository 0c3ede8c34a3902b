"""Control tokens inside the text of a data set, such as `<|im_end|>` in a user's question: found, counted, escaped.

A tokenizer reads the string of a special token in a text as that token. To escape it, each such string in the data is
replaced by a placeholder of the same length, then the template is rendered, then placeholders and the special tokens
of the template change places:

    data      a<|im_end|>b                      ->  aPPPPPPPPPPb
    rendered  <|im_start|>...aPPPPPPPPPPb<|im_end|>  ->  QQQQQQQQQQQQ...a<|im_end|>bPPPPPPPPPP

A copy of the tokenizer, whose special tokens are called like the placeholders, reads the result. It gives the
template's tokens their ids, and reads the data's strings as plain text, which decodes to the same characters. Spans
of characters stay valid, since the lengths do.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, cast, get_args

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from potstill.core.counts import count_noun
from potstill.core.errors import DataError, UsageError
from potstill.models.tokenizers.chat_renderer import compile_names

ControlTokenPolicy = Literal["keep", "escape", "refuse"]
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # no control token: models look it up by its name
FIRST_PLACEHOLDER = 0xF0000  # a plane of Unicode for private use


def check_control_token_policy(special_in_text: str) -> ControlTokenPolicy:
    """`special_in_text` itself. Raises: UsageError if there is no such policy."""
    if special_in_text not in get_args(ControlTokenPolicy):
        choices = ", ".join(get_args(ControlTokenPolicy))
        raise UsageError(f"--special-in-text is {special_in_text!r}; it can be {choices}")
    return cast(ControlTokenPolicy, special_in_text)


class ControlTokens:
    """The special tokens of a tokenizer as strings that a text may contain."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.placeholders = {
            name: chr(FIRST_PLACEHOLDER + number) * len(name)
            for number, name in enumerate(sorted(names))
            if name and not BYTE_TOKEN.fullmatch(name)
        }
        self._pattern = compile_names(self.placeholders)
        self._exchange = {**self.placeholders, **{value: name for name, value in self.placeholders.items()}}
        self._exchange_pattern = compile_names(self._exchange)

    def count(self, text: str) -> int:
        """How many control tokens a text contains."""
        return len(self._pattern.findall(text))

    def mask(self, text: str) -> str:
        """The text with placeholders for its control tokens."""
        return self._pattern.sub(lambda match: self.placeholders[match[0]], text)

    def exchange(self, text: str) -> str:
        """The text with its placeholders and its control tokens exchanged."""
        return self._exchange_pattern.sub(lambda match: self._exchange[match[0]], text)

    def mask_messages(
        self, messages: Sequence[Mapping[str, Any]], policy: ControlTokenPolicy
    ) -> tuple[Sequence[Mapping[str, Any]], int]:
        """The messages, with placeholders to `escape` their control tokens, and how many tokens these are.

        Raises: DataError to `refuse` them.
        """
        count = sum(self.count(message["content"]) for message in messages)
        if count and policy == "refuse":
            raise DataError(
                f"its text contains {count_noun(count, 'control token')} of the tokenizer; clean it, or give "
                f"--special-in-text escape"
            )
        return [self.mask_message(m) for m in messages] if count and policy == "escape" else messages, count

    def mask_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message with placeholders in all its texts."""
        return cast(dict[str, Any], self._mask_value({**message, "role": ""})) | {"role": message["role"]}

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids and offsets of an exchanged text."""
        encoding = self._placeholder_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.offsets

    def _mask_value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.mask(value)
        if isinstance(value, Mapping):
            return {name: self._mask_value(entry) for name, entry in value.items()}
        return [self._mask_value(entry) for entry in value] if isinstance(value, list) else value

    @cached_property
    def _placeholder_tokenizer(self) -> Tokenizer:
        """A copy of the tokenizer whose special tokens have the placeholders' names, and their own ids."""
        data = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in data["added_tokens"]:
            token["content"] = self.placeholders.get(token["content"], token["content"])
        model = data["model"]
        vocabulary = model["vocab"]
        model["vocab"] = (
            {self.placeholders.get(name, name): i for name, i in vocabulary.items()}
            if isinstance(vocabulary, dict)
            else [[self.placeholders.get(name, name), score] for name, score in vocabulary]
        )
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self.placeholders.get(model["unk_token"], model["unk_token"])
        renamed = Tokenizer.from_str(json.dumps(data))
        renamed.no_truncation()
        renamed.no_padding()
        return renamed
