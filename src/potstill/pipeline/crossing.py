"""A pair with two tokenizers, examined: each network in its own tokens, and how the two readings belong together.

Each network is a `World` of its own, whose loss is the cross-entropy of the text as that network reads it. The checks
here look at what both read: is it one text, and does what is aligned stand for the same bytes? They join the bytes that
tokens stand for and know nothing of spans or of how the alignment was found.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.core.types import GROUPS, PAIRS, Batch, supervised, view
from potstill.data.pairs import Reader, translate
from potstill.data.spans import located
from potstill.objectives.named import CROSS_ENTROPY
from potstill.pipeline.examination import FAIL, NOTE, PASS, Check, Invariant, World, apart, examine
from potstill.pipeline.invariants import (
    answers_alone_trained,
    at_rest,
    documents_apart,
    gradient_as_differences,
    heads_explained,
    loss_as_defined,
    passes_add_up,
    stop_token_trained,
)
from potstill.pipeline.readings import bare, brief, equal, part_of, predicted, runs, said
from potstill.train.study import Study

FEW_ALIGNED = 0.9  # below this share of aligned tokens it is said that there are few
MOST = 16  # packs, and of them documents, that are looked at
ENDED = 0.5  # of the answers, at least this share has to end for the teacher
KEPT = 0.9  # of the documents, at least this share has to be the same text for both


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """What is checked: both networks as worlds of their own, what is trained, and some of the text as both read it.

    `documents` are short ones, each a batch, and `batch` the same ones in one pass; `whole` are packs as they are
    trained on, and `share` is that of their trained tokens which are aligned. `whole` stays where it was made.
    """

    student: World
    teacher: World
    readers: tuple[Reader, Reader]
    study: Study
    documents: Sequence[Batch]
    batch: Batch
    whole: Batch
    share: float

    @property
    def sides(self) -> Iterator[tuple[Batch, Reader]]:
        """What each network reads, and by which tokenizer."""
        return zip((view(self.whole, name) for name in ("student", "teacher")), self.readers, strict=True)


Across = Callable[[Crossing], Check | None]


def examine_across(found: Crossing, *, quick: bool = False) -> Iterator[Check]:
    """Every check of a pair with two tokenizers: those of both readings, then those of either network by itself."""
    yield from examine(found, TOGETHER_QUICK if quick else TOGETHER)
    own = [*EACH, stop_token_trained, *(() if quick else TRAINED)]
    for world, checks in ((found.student, own), (found.teacher, EACH)):
        for check in examine(world, checks):
            yield replace(check, name=f"{check.name} ({world.role})")


def same_text(found: Crossing) -> Check:
    """What the teacher is asked about is text that the student is trained on, byte for byte."""
    texts = [said(batch, reader) for batch, reader in found.sides]
    other = [pair for pair in zip(*texts, strict=True) if not part_of(*pair)]
    kept = 1 - len(other) / len(texts[0])
    example = "".join(f"; {brief(a)} is {brief(b)} for the teacher" for a, b in other[:1])
    good = kept >= KEPT
    return Check(
        name="same text",
        outcome=FAIL if not good else NOTE if other else PASS,
        found=f"in {kept:.1%} of {len(texts[0])} documents{example}",
        why="a teacher whose tokenizer rewrites the text is asked about another one",
        remedy="" if good else "take a teacher whose tokenizer keeps the text as it is, letter case and spaces too",
    )


def aligned_tokens(found: Crossing) -> Check:
    """How many of the student's trained tokens the teacher has too."""
    enough = found.share >= FEW_ALIGNED
    told = "" if enough else "; at the others an objective at aligned tokens learns nothing from the teacher"
    return Check(
        name="aligned tokens",
        outcome=PASS if enough else NOTE,
        found=f"{found.share:.1%} of those trained on{told}",
        why="only there do both predict the same bytes",
    )


def same_bytes(found: Crossing) -> Check:
    """What is aligned, single tokens and runs of them, stands for the same bytes of the same document."""
    (ours, student), (theirs, teacher) = found.sides
    own, other = predicted(ours, student), predicted(theirs, teacher)
    tokens = [(own[a], other[b]) for a, b in found.whole[PAIRS].T.tolist()]
    groups = [runs(side, found.whole[key].tolist()) for side, key in zip((own, other), GROUPS, strict=True)]
    both = [(groups[0].get(n, b""), groups[1].get(n, b"")) for n in sorted(groups[0].keys() | groups[1].keys())]
    documents = [supervised(batch)[2][rows] for batch, rows in zip((ours, theirs), found.whole[PAIRS], strict=True)]
    wrong = [pair for pair in tokens + both if not equal(*pair)]
    good = not wrong and torch.equal(*documents)
    counted = f"{len(tokens):,} tokens and {len(both):,} runs of them"
    example = f", such as {wrong[0][0]!r} and {wrong[0][1]!r}" if wrong else ""
    return Check.of(
        "same bytes",
        good,
        found=counted if good else f"{len(wrong):,} of {counted} are not{example}",
        why="a row that learns from another token's row learns something else in silence",
    )


def aligned_with_itself(found: Crossing) -> Check | None:
    """A tokenizer beside itself has every token aligned with itself."""
    every = [_itself(bare(text), reader) for batch, reader in found.sides for text in said(batch, reader)[:MOST]]
    lost, total = (sum(counts) for counts in zip(*every, strict=True))
    if not total:
        return None
    return Check.of(
        "aligned with itself",
        not lost,
        found=f"all {total:,} tokens" if not lost else f"{lost:,} of {total:,} tokens are not",
        why="an alignment that is off by one shows here, whatever the other tokenizer is",
    )


def _itself(text: str, reader: Reader) -> tuple[int, int]:
    """How many tokens of `text` are not aligned with themselves, of how many that stand for some of it.

    None of a text that does not come back: one that gets a space in front, or is rewritten, is read otherwise then.
    """
    ids = located([text], reader.tokenizer, reader.pieces, specials=False)[0].ids
    if not len(ids):
        return 0, 0
    plain = reader._replace(marks=None)
    (one,) = translate([(ids, ids)], plain, plain)
    opening = len(one.input_ids) - len(ids)
    if opening < 0 or not torch.equal(one.input_ids[opening:], ids):
        return 0, 0
    told = [b"" if i in reader.pieces.special else reader.pieces.of[i] for i in ids.tolist()]
    if reader.dummy and told[0] == b" ":
        told[0] = b""  # put in front by the tokenizer; in no text
    want = [n for n, piece in enumerate(told) if piece]
    return len({(n, n + opening) for n in want} - set(map(tuple, one.same.tolist()))), len(want)


def stop_token_taught(found: Crossing) -> Check | None:
    """What the student is trained to end its answers with, the teacher ends them with too."""
    if found.teacher.kind == "text":
        return None
    good, hard = found.teacher.stops >= ENDED, CROSS_ENTROPY in found.study.term_names
    otherwise = "" if good or not hard else "; at the others cross-entropy alone teaches it"
    return Check(
        name="stop token taught",
        outcome=PASS if good else NOTE if hard else FAIL,
        found=f"in {found.teacher.stops:.0%} of the answers{otherwise}",
        why="a student that is never taught to stop runs on when it is asked",
        remedy="" if good or hard else "take a teacher with an end-of-text token, or a --cross-entropy above 0",
    )


def teacher_at_rest(found: Crossing) -> Check:
    """The objective gives the same twice, whatever mode the teacher was left in."""
    return at_rest(found.teacher.student, lambda: _sums(found, found.batch), tolerance=found.student.tolerance)


def documents_add_up(found: Crossing) -> Check | None:
    """The objective's sums over some documents are those of each document in a pass of its own."""
    if not found.study.objective.additive:
        return None
    gap = apart(torch.stack([_sums(found, one) for one in found.documents]).sum(0), _sums(found, found.batch))
    return Check.of(
        "documents add up",
        gap <= found.student.tolerance,
        found=f"within {gap:.1e}",
        why="packing, rows of another document and means of means all show here",
    )


def _sums(found: Crossing, batch: Batch) -> Tensor:
    with torch.no_grad():
        sums: Tensor = found.study(**batch)["sums"].double().cpu()
    return sums


TOGETHER_QUICK: Sequence[Across] = (same_text, aligned_tokens, same_bytes, aligned_with_itself, stop_token_taught)
TOGETHER: Sequence[Across] = (*TOGETHER_QUICK, documents_add_up, teacher_at_rest)
EACH: Sequence[Invariant] = (heads_explained, documents_apart, loss_as_defined, answers_alone_trained)
TRAINED: Sequence[Invariant] = (passes_add_up, gradient_as_differences)
