r"""Chats that are one text, as in HH-RLHF (Bai et al., 2022, arXiv:2204.05862): `\n\nHuman: Hi\n\nAssistant: Hello.`"""

import re
from typing import Any

from potstill.data.turns import read_turn

SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: Any) -> bool:
    """Whether a value is a text that begins with a turn of a human."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def read_transcript(text: str, *, has_answer: bool = True) -> list[dict[str, str]]:
    """The turns of a transcript, without the spaces around them.

    Without `has_answer` it is a prompt, whose last `Assistant:` opens the answer and is no turn.
    """
    pieces = SPEAKER.split(text.lstrip())[1:]
    turns = [
        read_turn({"role": ROLES[speaker], "content": content.strip()})
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    is_open = not has_answer and turns[-1] == {"role": "assistant", "content": ""}
    return turns[:-1] if is_open else turns
