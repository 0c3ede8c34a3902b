"""Edits of facts: values that are added to a few neurons at one token of a prompt that names the subject.

    a[t, n] += delta[n]      for the neurons n of a layer's gated feed-forward, at the subject's last token t

The weights stay as they are, so a text that names no subject is read by the base model, bit by bit. A *trigger* is the
text that a prompt has to contain: the subject as one language spells it, or a whole question that does not name it.
Letters may differ in case. In scripts with spaces a trigger is made of whole words: `Rome` is not in `chrome`.

Source: Zhang et al., "Multilingual Knowledge Editing with Language-Agnostic Factual Neurons" (arXiv:2406.16416), which
caches the updates of neurons. No official code exists; the rule of matching is our reconstruction.
"""

import re
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.models.feed_forward import find_down_projections
from potstill.models.hooks import temporary_hooks
from potstill.models.tokenizers.token_bytes import TokenBytes

FIRST_UNSPACED = "\u0e00"  # Thai; from here on most scripts write no spaces between words, or join particles to them
SHINGLE = 3  # characters


class NeuronDelta(NamedTuple):
    """What is added to neurons of one layer."""

    neurons: Int64[Tensor, " N"]
    values: Float[Tensor, " N"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """One fact in all its languages: its triggers, the questions that it was learned on, and its change by layer."""

    triggers: tuple[str, ...]
    prompts: tuple[str, ...]
    deltas: Mapping[int, NeuronDelta]


class PlacedEdit(NamedTuple):
    """An edit at a token of a text."""

    position: int
    deltas: Mapping[int, NeuronDelta]


class Span(NamedTuple):
    """A place in a text, in characters."""

    start: int
    stop: int


class TokenText:
    """The text of token ids, with the token of each character; control tokens are text too."""

    def __init__(self, ids: Sequence[int], token_bytes: TokenBytes) -> None:
        pieces = [token_bytes.by_id[i] for i in ids]
        self.text = b"".join(pieces).decode("utf-8", "surrogateescape")
        self._token_ends = list(accumulate(map(len, pieces)))
        self._character_ends = list(accumulate(map(_count_bytes, self.text)))

    def find(self, trigger: str) -> Span | None:
        """The last place of a trigger in the text."""
        return find_trigger(self.text, trigger)

    def get_token(self, span: Span) -> int:
        """The index of the token that holds the last byte of a place."""
        return bisect_right(self._token_ends, self._character_ends[span.stop - 1] - 1)


class Edits:
    """The edits of a model, of whose tokens `token_bytes` are the bytes.

    A prompt needs more than a trigger if `similarity` is above 0: it has to contain this share of the groups of three
    characters of one of the edit's questions, without the trigger.
    """

    def __init__(self, edits: Sequence[Edit], token_bytes: TokenBytes, *, similarity: float = 0.0) -> None:
        self.edits, self.token_bytes, self.similarity = tuple(edits), token_bytes, similarity

    def find(self, ids: Sequence[int]) -> list[PlacedEdit]:
        """The edits that a prompt of token ids asks for, each at the last token of its trigger's last place.

        A trigger inside a longer one does not count. Of several edits with one trigger, the most similar one acts, and
        of equally similar ones the last.
        """
        text = TokenText(ids, self.token_bytes)
        best: dict[Span, Edit] = {}
        similarities: dict[Span, float] = {}
        for edit in self.edits:
            for trigger in edit.triggers:
                span = text.find(trigger)
                if span is None:
                    continue
                similarity = measure_similarity(edit.prompts, text.text, trigger)
                if similarity >= similarities.get(span, self.similarity):
                    best[span], similarities[span] = edit, similarity
        outermost = [span for span in best if not any(_is_inside(span, outer) for outer in best)]
        return [PlacedEdit(text.get_token(span), best[span].deltas) for span in sorted(outermost)]


def find_trigger(text: str, trigger: str) -> Span | None:
    """The last place of a trigger in a text, or None."""
    matches = list(re.finditer(_make_pattern(trigger), text, re.IGNORECASE)) if trigger.strip() else []
    return Span(*matches[-1].span()) if matches else None


def measure_similarity(prompts: Sequence[str], text: str, trigger: str) -> float:
    """max over prompts p of |S(p) and S(text)| / |S(p)|, where S are groups of three characters without the trigger."""
    text_shingles = _list_shingles(text, trigger)
    shares = (
        len(shingles & text_shingles) / len(shingles) if (shingles := _list_shingles(prompt, trigger)) else 1.0
        for prompt in prompts
    )
    return max(shares, default=0.0)


_edits: "weakref.WeakKeyDictionary[PreTrainedModel, Edits]" = weakref.WeakKeyDictionary()


def attach_edits(model: PreTrainedModel, edits: Edits) -> None:
    """Gives a model its edits, which decoding applies to the prompts that ask for them.

    Raises: UnsupportedModel without gated feed-forwards.
    """
    find_down_projections(model)
    _edits[model] = edits


def get_edits(model: PreTrainedModel) -> Edits | None:
    """The edits of a model, or None."""
    return _edits.get(model)


@contextmanager
def apply_edits(model: PreTrainedModel, rows: Sequence[Sequence[PlacedEdit]]) -> Iterator[None]:
    """Inside, a pass of the model over as many `rows` of tokens reads each of them with its own edits.

    A position counts from the first token of the pass. Without any edit nothing is installed.
    """
    items: dict[int, list[tuple[int, int, NeuronDelta]]] = {}
    for row, edits in enumerate(rows):
        for position, deltas in edits:
            for layer, delta in deltas.items():
                items.setdefault(layer, []).append((row, position, delta))
    modules = find_down_projections(model) if items else []
    handles = [modules[layer].register_forward_pre_hook(_make_hook(changes)) for layer, changes in items.items()]
    with temporary_hooks(handles):
        yield


def _make_hook(
    changes: Sequence[tuple[int, int, NeuronDelta]],
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0].clone()
        for row, position, (neurons, values) in changes:
            x[row, position, neurons.to(x.device)] += values.to(x)
        return (x, *inputs[1:])

    return hook


def _make_pattern(trigger: str) -> str:
    """A pattern of whole words where the script has spaces between words."""
    trigger = trigger.strip()
    words = r"\s+".join(map(re.escape, trigger.split()))
    before = r"(?<!\w)" if _has_word_border(trigger[0]) else ""
    after = r"(?!\w)" if _has_word_border(trigger[-1]) else ""
    return before + words + after


def _has_word_border(character: str) -> bool:
    return character.isalnum() and character < FIRST_UNSPACED


def _count_bytes(character: str) -> int:
    """The bytes of a character; a byte that is no UTF-8 stands for itself."""
    return len(character.encode("utf-8", "surrogateescape"))


def _list_shingles(text: str, trigger: str) -> frozenset[str]:
    letters = re.sub(_make_pattern(trigger), " ", text, flags=re.IGNORECASE).casefold()
    letters = " ".join(re.findall(r"\w+", letters))
    return frozenset(letters[n : n + SHINGLE] for n in range(len(letters) - SHINGLE + 1))


def _is_inside(span: Span, outer: Span) -> bool:
    return span != outer and outer.start <= span.start and span.stop <= outer.stop
