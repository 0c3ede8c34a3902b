"""Turns tokens into text piece by piece: whole characters only, and nothing that a stop string may still begin."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what a decoder writes for the first bytes of a character


class TextStream:
    """The text of the tokens pushed so far, without special tokens; `stop_string` is the one that ended it.

    The pieces that `push` returns are together the decoded tokens, up to the first stop string. A piece is the
    difference between two decoded windows, because a token alone may decode differently (spaces, parts of characters).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop_strings = tokenizer, [text for text in stop_strings if text]
        self.stop_string: str | None = None
        self.tokens: list[int] = []
        self._window_start, self._window_end = 0, 0  # tokens before the end are part of the text already
        self._unsent_text = ""

    def push(self, token: int) -> str:
        """The text that is certain with this token."""
        self.tokens.append(token)
        return self._release(self._decode_window(is_last=False))

    def flush(self) -> str:
        """The rest of the text, if no more token comes."""
        if self.stop_string is not None:
            return ""
        text = self._release(self._decode_window(is_last=True)) + self._unsent_text
        self._unsent_text = ""
        return text

    def _decode_window(self, *, is_last: bool) -> str:
        """The new characters since the last call, or none while the last one is incomplete."""
        window_text = self._decode(self._window_start, self._window_end)
        text = self._decode(self._window_start, len(self.tokens))
        if not is_last and (len(text) <= len(window_text) or text.endswith(INCOMPLETE)):
            return ""
        self._window_start, self._window_end = self._window_end, len(self.tokens)
        return text[len(window_text) :]

    def _decode(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self.tokens[start:end], skip_special_tokens=True)) if start < end else ""

    def _release(self, new_text: str) -> str:
        """The certain part of the text that is not sent yet; a stop string and what follows it are dropped."""
        text = self._unsent_text + new_text
        matches = [(text.find(stop), stop) for stop in self.stop_strings if stop in text]
        if matches:
            end, self.stop_string = min(matches)
            self._unsent_text = ""
            return text[:end]
        held_length = max((_count_overlap(text, stop) for stop in self.stop_strings), default=0)
        certain_length = len(text) - held_length
        self._unsent_text = text[certain_length:]
        return text[:certain_length]


def _count_overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
