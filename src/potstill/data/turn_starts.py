"""Finds in a rendered chat where the words of the user's turns begin, so that a long chat can be cut there.

<|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
                                                         ^^
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from potstill.core.errors import DataError
from potstill.data.chat_template import ChatTemplate

SAMPLE_CONTENTS = ("potstill0.", "potstill1.", "potstill2.", "potstill3.")


def find_turn_opener(template: ChatTemplate) -> str:
    """What a template writes right before any of the user's turns; empty if it refuses a plain chat."""
    roles = ("user", "assistant", "user", "assistant")
    try:
        text = template.render(
            [{"role": role, "content": content} for role, content in zip(roles, SAMPLE_CONTENTS, strict=True)]
        )
    except DataError:
        return ""
    places = [text.find(content) for content in SAMPLE_CONTENTS]
    if min(places) < 0:
        return ""
    first = text[: places[0]]
    second = text[places[1] + len(SAMPLE_CONTENTS[1]) : places[2]]
    pairs = zip(reversed(first), reversed(second), strict=False)
    size = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return first[len(first) - size :]


def find_turn_starts(text: str, messages: Sequence[Mapping[str, Any]], opener: str) -> list[int]:
    """The positions in `text` at which the contents of the user's messages begin, in order.

    A content that the template has changed is not found, and left out.
    """
    starts, position = [], 0
    for message in messages:
        content = message.get("content")
        content = content.strip() if isinstance(content, str) else ""
        if not content:
            continue
        place = -1
        if message["role"] == "user" and opener:
            place = text.find(opener + content, position)
            place += len(opener) if place >= 0 else 0
        place = text.find(content, position) if place < 0 else place
        if place >= 0:
            starts += [place] if message["role"] == "user" else []
            position = place + len(content)
    return starts
