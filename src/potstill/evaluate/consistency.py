"""How far sampled answers agree, and pairs of a chosen and a rejected answer that follow from it (CM-Align).

The consistency of an answer is its mean similarity to the others:

    s_i = 1 / (n - 1) sum over j != i of sim(i, j)          s_1 = 1 for one answer

| kind | sim of two answers |
|---|---|
| numbers | 1 for equal final answers (`data.answers`) after the thinking, else 0: the share of votes |
| code | 1 - d / length: d is the edit distance of the tokens of both snippets, after `evaluate.code_forms` |
| text | the cosine of their embeddings |

An answer that cannot be read (no final answer, no code) has no vote: its similarity to all others is 0, and it is never
preferred or rejected. The most consistent answer in the pivot language (English by default) is the pivot. For each
other language, the answer most similar to the pivot is chosen and the least similar one rejected.

Source: CM-Align (arXiv:2509.08541). Its code was not available: the similarity of code, what happens at ties, and that
an unreadable answer is left out follow from the paper's idea and are ours. The paper compares embeddings of a sentence
model; `generate --select prefer` has the model's own hidden states. Cosines favor answers of the pivot's length.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from potstill.core.errors import UsageError
from potstill.data.answers import extract_answer, read_answer
from potstill.data.thinking import get_answer_part
from potstill.evaluate.code_forms import compare_code, read_code

KINDS = ("numbers", "code", "text")
TOLERANCE = 1e-6  # similarities that differ by less are equal

Embed: TypeAlias = Callable[[Sequence[str]], Float[Tensor, "N D"]]


class PreferredPair(NamedTuple):
    """Two answers to one prompt."""

    chosen: str
    rejected: str


def consistency(texts: Sequence[str], *, kind: str = "numbers", embed: Embed | None = None) -> list[float]:
    """The mean similarity of each text to the others, in the order of the texts.

    `embed` gives the embeddings of the kind `text`.

    Raises: UsageError for an unknown kind, or the kind `text` without `embed`.
    """
    similarity = compute_similarity(texts, kind=kind, embed=embed)
    if len(texts) == 1:
        return [float(is_readable(texts[0], kind=kind))]
    return ((similarity.sum(1) - similarity.diagonal()) / max(1, len(texts) - 1)).tolist()


def prefer(
    pivots: Sequence[str], texts: Sequence[str], *, kind: str = "numbers", embed: Embed | None = None
) -> PreferredPair | None:
    """The chosen and the rejected text: the most and the least similar one to the most consistent of `pivots`.

    None where different pivots share the highest consistency, as any two alone do, where no pivot or fewer than two
    texts can be read, or where all texts are equally similar. Among texts that are equally similar, the lowest
    SHA-256 decides, so neither their order nor their length matters.

    Raises: as `consistency` does.
    """
    similarity = compute_similarity([*pivots, *texts], kind=kind, embed=embed)
    pivot = _find_pivot(similarity[: len(pivots), : len(pivots)], pivots, kind)
    readable = [n for n, text in enumerate(texts) if is_readable(text, kind=kind)]
    if pivot is None or len(readable) < 2:
        return None
    scores = {n: float(similarity[pivot, len(pivots) + n]) for n in readable}
    best, worst = max(scores.values()), min(scores.values())
    if best - worst < TOLERANCE:
        return None
    chosen = [texts[n] for n, score in scores.items() if best - score < TOLERANCE]
    rejected = [texts[n] for n, score in scores.items() if score - worst < TOLERANCE]
    return PreferredPair(min(chosen, key=_hash), min(rejected, key=_hash))


def compute_similarity(texts: Sequence[str], *, kind: str, embed: Embed | None = None) -> Float[Tensor, "N N"]:
    """The similarity of all pairs of texts, in float64; 0 where one of them cannot be read.

    Raises: as `consistency` does.
    """
    if kind == "numbers":
        return _compare_answers(texts)
    if kind == "code":
        return compare_code(texts)
    if kind != "text":
        raise UsageError(f"the kind of consistency is {kind!r}; it can be {', '.join(KINDS)}")
    if embed is None:
        raise UsageError("the consistency of texts compares their embeddings; give embed, a function of texts")
    if not texts:
        return torch.zeros(0, 0, dtype=torch.float64)
    units = normalize(embed(texts).double(), dim=-1)
    return units @ units.T


def is_readable(text: str, *, kind: str) -> bool:
    """Whether a text has a vote: a final answer, code, or any text."""
    if kind == "numbers":
        return _extract_final_answer(text) is not None
    return read_code(text) is not None if kind == "code" else bool(text.strip())


def _extract_final_answer(text: str) -> str | None:
    return extract_answer(get_answer_part(text))


def _compare_answers(texts: Sequence[str]) -> Float[Tensor, "N N"]:
    answers = [None if answer is None else read_answer(answer) for answer in map(_extract_final_answer, texts)]
    rows = [[a is not None and b is not None and a.matches(b) is True for b in answers] for a in answers]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(texts), len(texts))


def _find_pivot(similarity: Float[Tensor, "P P"], pivots: Sequence[str], kind: str) -> int | None:
    """The index of the most consistent pivot; None where none can be read, or where different ones tie."""
    readable = [n for n, text in enumerate(pivots) if is_readable(text, kind=kind)]
    if not readable:
        return None
    scores = {n: float(similarity[n].sum() - similarity[n, n]) for n in readable}
    best = [n for n, score in scores.items() if max(scores.values()) - score < TOLERANCE]
    if any(similarity[best[0], n] < 1 - TOLERANCE for n in best[1:]):
        return None
    return min(best, key=lambda n: _hash(pivots[n]))


def _hash(text: str) -> bytes:
    return sha256(text.encode()).digest()
