"""A chat as another template writes it: the same turns, word for word, between the other's own marks.

What a template writes between two turns depends on their roles alone, and is learnt from a few chats that it renders:

    from and to         SmolLM2                               Gemma 3
    start, user         (its own system message) ...user\\n    <bos><start_of_turn>user\\n
    user, assistant     <|im_end|>\\n<|im_start|>assistant\\n   <end_of_turn>\\n<start_of_turn>model\\n
    assistant, end      <|im_end|>\\n                          <end_of_turn>\\n

So a window of a student's tokens is taken apart into turns, wherever it was cut and whoever wrote it, and told again as
the teacher expects a chat. What a template does beyond that (trimming, folding turns) is not imitated: the turns are
those of the student's text, byte for byte, since only the same bytes can be compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import AnyStr, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import DataError
from potstill.data.spans import read_back, readable
from potstill.data.template import ChatTemplate
from potstill.models.pieces import Pieces

START, END, UNKNOWN = "start", "end", "unknown"
SPEAKERS = (
    ("user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
    ("user", "user", "assistant"),
    ("user", "assistant", "assistant"),
)  # the chats that a template is learnt from; those that it refuses are passed over
LINE = "\n"
BREAK = "\n\n"  # between two turns that a template has no mark for


class Mark(NamedTuple):
    """What stands between a turn of `last` and one of `next`: as text, and as the bytes that its tokens stand for."""

    last: str
    next: str
    text: str
    data: bytes


class Turn(NamedTuple):
    """What `role` says, the bytes `[start, stop)` of a window; `ends` where the ending behind an answer begins."""

    role: str
    start: int
    stop: int
    ends: int | None


class Retold(NamedTuple):
    """A window as another template writes it, and the segments of bytes that both texts have, one under the other.

    `own`, `theirs` and `common` are `[S 2]`: in the window, in `text`, and in `shared`, where they lie end to end. An
    ending is one byte of `shared`.
    """

    text: str
    own: Int64[Tensor, "S 2"]
    theirs: Int64[Tensor, "S 2"]
    common: Int64[Tensor, "S 2"]
    shared: bytes


@dataclass(frozen=True, eq=False)
class Marks:
    """The marks of a template, the string that ends an answer, the special tokens that marks are made of, and a BOS.

    Of two marks between the same roles the first is how a chat's last answer is opened, the last how all others are.
    """

    all: Sequence[Mark]
    ending: str
    special: Mapping[int, bytes]
    bos: str

    @classmethod
    def learnt(cls, tokenizer: PreTrainedTokenizerBase, pieces: Pieces) -> "Marks | None":
        """Those of a tokenizer's template; None where it has none, or one that writes chats otherwise than this."""
        try:
            template = ChatTemplate(tokenizer)
        except DataError:
            return None
        found: dict[Mark, frozenset[int]] = {}
        for roles in SPEAKERS:
            found |= dict(_learnt(template, pieces, roles))
        special = {i: pieces.of[i] for i in frozenset().union(*found.values()) & pieces.special}
        written = [str(tokenizer.convert_ids_to_tokens(i)) for i in special]
        ending = next((token for token in written if template.stop.endswith(token)), template.stop)
        marks = cls(list(found), ending, special, _bos(tokenizer))
        return marks if ending and marks.text("user", "assistant") != BREAK else None

    @classmethod
    def unknown(cls, tokenizer: PreTrainedTokenizerBase, pieces: Pieces) -> bool:
        """Whether there is a template, and nothing could be learnt of it."""
        return bool(tokenizer.chat_template) and cls.learnt(tokenizer, pieces) is None

    @classmethod
    def plain(cls, tokenizer: PreTrainedTokenizerBase) -> "Marks":
        """Those of a tokenizer without a template: a line break between turns, its end of text behind the last."""
        bos, ending = _bos(tokenizer), str(tokenizer.eos_token or "")
        roles = ("system", "user", "assistant")
        between = [Mark(last, role, LINE, LINE.encode()) for last in roles for role in roles]
        opening = [Mark(START, role, bos, bos.encode()) for role in roles]
        return cls([*opening, *between, Mark("assistant", END, ending, ending.encode())], ending, {}, bos)

    def taken(self, data: bytes) -> tuple[list[Turn], bool]:
        """The turns of a window, and whether it begins where the chat does.

        What no mark explains belongs to whoever speaks. A window that begins within a turn is the assistant's until a
        mark says otherwise, and one that ends within a mark ends with the answer before it.
        """
        opening = next((mark for mark in self._following[START] if data.startswith(mark.data)), None)
        role, place = self._begun(data) if opening is None else (opening.next, len(opening.data))
        turns = []
        while (found := self._next(role, data, place)) is not None:
            at, mark = found
            turns.append(self._turn(data, mark.last, place, at))
            role, place = mark.next, at + len(mark.data)
        turns.append(self._turn(data, role, place, self._end(data, role, place)))
        return turns, opening is not None

    def text(self, last: str, role: str, *, final: bool = True) -> str:
        """What is written between two turns. A system message without a mark of its own opens what the user says."""
        found = [mark.text for mark in self.all if (mark.last, mark.next) == (last, role)]
        if found or last != START:
            return found[0 if final else -1] if found else BREAK
        opening = self.text(START, "user")
        return opening if role == "system" else self.bos * opening.startswith(self.bos)

    def _begun(self, data: bytes) -> tuple[str, int]:
        """Who speaks in a window that begins within a chat, and from where: one may begin within a mark, too."""
        bos = self.bos.encode()
        place = len(bos) if bos in self.special.values() and data.startswith(bos) else 0
        for mark in self._following[UNKNOWN]:
            cuts = (at for token in self.special.values() if (at := mark.data.find(token, 1)) > 0)
            if any(data.startswith(rest := mark.data[at:], place) for at in cuts):
                return mark.next, place + len(rest)
        return UNKNOWN, place

    def _end(self, data: bytes, role: str, place: int) -> int:
        """Where the last turn of a window ends: at the last ending behind which nothing but the rest of a mark comes.

        Of a turn that is no answer, where the first special token of a mark that was cut stands.
        """
        if role not in ("assistant", UNKNOWN):
            return min((at for one in self.special.values() if (at := data.find(one, place)) >= 0), default=len(data))
        ending = self.ending.encode()
        closing = [mark.data.partition(ending) for mark in self.all if mark.last == "assistant"]
        at = data.rfind(ending, place)
        while at >= 0 and not any(found and rest.startswith(data[at + len(ending) :]) for _, found, rest in closing):
            at = data.rfind(ending, place, at)
        if at < 0:
            return len(data)
        before = next((one for one, found, _ in closing if found and one and data.endswith(one, place, at)), b"")
        return at - len(before)

    def _turn(self, data: bytes, role: str, start: int, stop: int) -> Turn:
        ends = data.find(self.ending.encode(), stop) if role in ("assistant", UNKNOWN) else -1
        return Turn(role, start, stop, None if ends < 0 or data[stop:ends].strip() else ends)

    def _next(self, role: str, data: bytes, place: int) -> tuple[int, Mark] | None:
        """The first mark from `place` on that may follow `role`, the longest of those that begin there."""
        found = [(at, mark) for mark in self._following[role] if (at := data.find(mark.data, place)) >= 0]
        return min(found, key=lambda one: one[0], default=None)

    @cached_property
    def _following(self) -> Mapping[str, list[Mark]]:
        """The marks that may follow each role, the longest first; of an unknown one those of user and assistant."""
        marks = sorted((mark for mark in self.all if mark.data and mark.next != END), key=lambda mark: -len(mark.data))
        found = {role: [m for m in marks if m.last == role] for role in (START, "system", "user", "assistant")}
        within = [m for m in marks if m.last in ("user", "assistant")]  # what a system message ends with may be a break
        within.sort(key=lambda m: (-len(m.data), m.last != ("user" if m.next == "assistant" else "assistant")))
        return {**found, UNKNOWN: within}


class _Part(NamedTuple):
    """A piece of the text that is told, of which bytes `own` of the window it is told, and those that both share."""

    text: str
    own: tuple[int, int] | None = None
    shared: bytes = b""


def retold(data: bytes, student: Marks, teacher: Marks) -> Retold:
    """A window of a student's text (special tokens of its marks written out) as the teacher's template writes it."""
    parts = list(_parts(data, student, teacher))
    sizes = torch.tensor([[len(part.text.encode()), len(part.shared)] for part in parts])
    ends = sizes.cumsum(0)
    kept = torch.tensor([bool(part.own) for part in parts])
    laid = torch.stack([ends - sizes, ends], -1)[kept]  # [S, (theirs, common), (start, end)]
    own = torch.tensor([part.own for part in parts if part.own], dtype=torch.int64).reshape(-1, 2)
    shared = b"".join(part.shared for part in parts)
    return Retold("".join(part.text for part in parts), own, laid[:, 0], laid[:, 1], shared)


def _parts(data: bytes, student: Marks, teacher: Marks) -> Iterator[_Part]:
    turns, whole = student.taken(data)
    last, ends, size = START, None, len(student.ending.encode())
    for number, turn in enumerate(turns):
        final = number == len(turns) - 1
        role = turn.role if whole or number else UNKNOWN
        yield from _mark(teacher.text(last, role, final=final), teacher.ending, ends, size)
        for start, stop in _said(data, turn, student):
            yield _Part(readable(data[start:stop]), (start, stop), data[start:stop])
        last, ends = turn.role, turn.ends
    if ends is not None:
        yield from _mark(teacher.text("assistant", END), teacher.ending, ends, size)


def _said(data: bytes, turn: Turn, marks: Marks) -> Iterator[tuple[int, int]]:
    """The stretches of a turn between special tokens that no mark explains, which are no text to another tokenizer."""
    start = turn.start
    while start < turn.stop:
        found = ((data.find(one, start, turn.stop), len(one)) for one in marks.special.values())
        at, size = min((one for one in found if one[0] >= 0), default=(turn.stop, 0))
        if at > start:
            yield start, at
        start = at + size


def _mark(text: str, ending: str, ends: int | None, size: int) -> Iterator[_Part]:
    """What the teacher's template writes there, its ending for the student's of `size` at `ends`."""
    if ends is None or not ending or ending not in text:
        yield _Part(text)
    else:
        before, _, behind = text.partition(ending)
        yield from (_Part(before), _Part(ending, (ends, ends + size), b"."), _Part(behind))


def _learnt(template: ChatTemplate, pieces: Pieces, roles: Sequence[str]) -> Iterator[tuple[Mark, frozenset[int]]]:
    """The marks of one chat, with their ids; none where the template refuses it or does not write what is said."""
    said = [f"potstill{number}." for number in range(len(roles))]
    try:
        text = template.render([{"role": role, "content": one} for role, one in zip(roles, said, strict=True)])
    except DataError:
        return
    ids = template.tokenizer(text, add_special_tokens=False).input_ids
    data, spans = read_back(ids, pieces, shown=pieces.special)
    texts, parts = _between(text, said), _between(data, [one.encode() for one in said])
    if texts is None or parts is None:
        return
    within = zip(pairwise((START, *roles, END)), texts, parts, strict=True)
    for (last, role), (start, stop), (first, end) in within:
        inside = ((spans[:, 0] >= first) & (spans[:, 1] <= end)).tolist()
        mark = Mark(last, role, text[start:stop], data[first:end])
        yield mark, frozenset(i for i, held in zip(ids, inside, strict=True) if held)


def _between(text: AnyStr, said: Sequence[AnyStr]) -> list[tuple[int, int]] | None:
    """The spans before, between and behind what is `said`; None where that does not stand there in order."""
    found: list[tuple[int, int]] = []
    place = 0
    for one in said:
        at = text.find(one, place)
        if at < 0:
            return None
        found.append((place, at))
        place = at + len(one)
    return [*found, (place, len(text))]


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the tokenizer itself puts before a text, if any."""
    return str(tokenizer.bos_token) if tokenizer.bos_token_id in tokenizer("").input_ids else ""
