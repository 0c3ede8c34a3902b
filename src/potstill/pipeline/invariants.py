"""The invariants of a pair: what training is going to compute, beside a plain and slow definition of it.

Each check is a function `World -> Check | None`, None where it does not apply. Tolerances follow from the dtype that is
computed in, eps^(2/3) of the value (2e-5 in float32, 4 % in bfloat16), and from the number of ids that a float32
softmax adds up (1e-3 for 262,144).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from potstill.core.errors import VocabularyMismatch
from potstill.core.types import Batch, Needs, Objective, Signals, supervised
from potstill.data.cache import Recalled
from potstill.models.evaluating import evaluating
from potstill.models.signals import head_explains, known_head, network, plain, signals
from potstill.models.vocabulary import shared_ids
from potstill.objectives.combine import Sum
from potstill.objectives.language import CrossEntropy
from potstill.ops.coarse import coarse
from potstill.ops.divergence import forward_kl
from potstill.pipeline.examination import (
    FAIL,
    FORWARD_KL,
    NOTE,
    PASS,
    Check,
    Invariant,
    World,
    apart,
    defined,
    rounded,
    study,
)
from potstill.train.study import Study

SAME_TOKENS, BY_ID = "same tokens", "a divergence compares the two distributions id by id"


def same_tokens(world: World) -> Check | None:
    """Teacher and student read text as the same ids."""
    if world.teacher_tokenizer is None:
        return None
    shared = shared_ids(world.teacher_tokenizer, world.student_tokenizer)
    widths = {role: plain(model).get_output_embeddings().weight.shape[0] for role, model in world.models.items()}
    padded = [f"{role}'s head of {width:,}" for role, width in widths.items() if width > shared]
    cut = f"; cut to them: {' and '.join(padded)}" if padded else ""
    return Check.of(SAME_TOKENS, True, found=f"{shared:,} ids shared{cut}", why=BY_ID)


def other_tokens(error: VocabularyMismatch, *, command: str) -> Check:
    """What is said of a pair whose tokenizers differ under an objective that compares token by token."""
    remedy = f"choose a teacher that has the student's tokenizer, or an objective that compares across: {command}"
    return Check.of(SAME_TOKENS, False, found=str(error), why=BY_ID, remedy=remedy)


def heads_explained(world: World) -> Check:
    """Head, scale and soft-cap, as they are read from the config, give the models' own logits."""
    wrong = [role for role, model in world.models.items() if not head_explains(plain(model))]
    fatal = "student" in wrong
    found = f"not of the {' and the '.join(wrong)}" if wrong else f"of {' and '.join(world.models)}"
    return Check(
        name="heads explained",
        outcome=FAIL if fatal else NOTE if wrong else PASS,
        found=found if fatal or not wrong else f"{found}, whose logits are computed whole",
        why="a head whose scale or soft-cap is ignored trains towards another distribution",
        remedy="choose a student of a family whose head is known" if fatal else "",
    )


def documents_apart(world: World) -> Check:
    """Documents of one pack do not see one another."""
    mixing = [role for role, model in world.models.items() if not network(model).packs]
    return Check(
        name="documents apart",
        outcome=NOTE if mixing else PASS,
        found=f"{' and '.join(mixing)} would mix them: padded instead, slower" if mixing else "packed, and apart",
        why="attention across documents changes every loss in silence",
    )


def loss_as_defined(world: World) -> Check:
    """The loss of a pack is what the models' own logits give, document by document, over the ids that are real."""
    with torch.no_grad():
        ours = study(world, compute=world.compute)(**world.batch)["sums"].double().cpu()
    theirs = defined(world, world.student, compute=world.compute)
    gap = apart(ours, theirs)
    good = gap <= world.tolerance
    found = f"within {gap:.1e}" if good else f"{rounded(ours)} where the definition gives {rounded(theirs)}"
    return Check.of(
        "loss as defined",
        good,
        found=found,
        why="packing, shifted labels, soft-caps, padded vocabularies and a teacher that drops out all show here",
    )


def gradient_as_differences(world: World) -> Check:
    """The gradient's own slope is the difference of losses a small step to either side of the weights (in float32).

    Adaptive KL's weights are constants of its gradient, though they move with the student: forward KL stands for it.
    """
    if world.compared.name == "adaptive_kl":
        world = replace(world, compared=FORWARD_KL)
    twin = copy.deepcopy(world.student).float().requires_grad_(True)
    loss = study(world, student=twin)(**world.batch)["loss"]
    loss.backward()
    weights = [(p, p.grad) for p in twin.parameters() if p.grad is not None]
    steep = sum(float(g.double().square().sum()) for _, g in weights)
    step = 2e-3 * max(loss.item(), 0.1) / max(steep, 1e-12)
    sides = [_moved(world, twin, weights, by) for by in (step, -2 * step)]
    slope = (sides[0] - sides[1]) / (2 * step)
    good = abs(slope - steep) <= 0.05 * steep
    return Check.of(
        "gradient as differences",
        good,
        found=f"within {abs(slope - steep) / max(steep, 1e-12):.1e}" if good else f"{steep:.3g} against {slope:.3g}",
        why="a loss may be right and its gradient wrong",
    )


@torch.no_grad()
def _moved(world: World, twin: nn.Module, weights: Sequence[tuple[Tensor, Tensor]], by: float) -> float:
    for weight, gradient in weights:
        weight.add_(gradient, alpha=by)
    return float(defined(world, twin, compute=torch.float32).mean()) / len(supervised(world.batch)[1])


def zero_for_itself(world: World) -> Check | None:
    """A student that is its teacher has no loss and no gradient, beside those of cross-entropy on the same text."""
    if world.teacher is None:
        return None
    twin = copy.deepcopy(plain(world.teacher)).requires_grad_(True)
    (soft, steepest), (hard, usual) = (_pull(world, twin, objective) for objective in (world.compared, CrossEntropy()))
    good = soft <= world.tolerance * max(1, hard) and steepest <= world.tolerance * max(1, usual)
    return Check.of(
        "zero for itself",
        good,
        found=f"loss {soft:.1e}, steepest gradient {steepest:.1e} (cross-entropy's {usual:.1e})",
        why="a loss that is not least at the teacher pulls the student away from it",
    )


def _pull(world: World, twin: nn.Module, objective: Objective) -> tuple[float, float]:
    """The size of the loss, and of the steepest entry of its gradient."""
    twin.zero_grad()
    study = Study(twin, objective, frozen={"teacher": world.teacher}, vocabulary=world.vocabulary)
    loss = study(**world.batch)["loss"]
    loss.backward()
    return abs(loss.item()), max(float(p.grad.abs().max()) for p in twin.parameters() if p.grad is not None)


@dataclass(frozen=True)
class _Certain:
    """A teacher that is sure of the text."""

    width: int

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        targets = supervised(batch)[1]
        rows = torch.full((len(targets), self.width), -1e4, device=targets.device)
        return Signals(rows=rows.scatter_(1, targets[:, None], 0.0), logits=lambda some: some)


def certain_teacher(world: World) -> Check:
    """The forward KL to a teacher that is sure of the text is the cross-entropy."""
    objective = Sum((0.5, CrossEntropy()), (0.5, FORWARD_KL))
    trained = Study(
        world.student, objective, frozen={"teacher": _Certain(world.vocabulary)}, vocabulary=world.vocabulary
    )
    with torch.no_grad():
        hard, soft = trained(**world.batch)["sums"].double().cpu()
    good = apart(hard, soft) <= world.tolerance
    return Check.of(
        "certain teacher",
        good,
        found=f"within {apart(hard, soft):.1e}",
        why="rows and targets that are off by one, or another direction of the divergence, show here",
    )


def teacher_at_rest(world: World) -> Check | None:
    """The teacher says the same twice, whatever mode it was left in."""
    if world.teacher is None:
        return None
    trained = study(world, compute=world.compute)

    def sums() -> Tensor:
        with torch.no_grad():
            return trained(**world.batch)["sums"].double().cpu()

    return at_rest(world.teacher, sums, tolerance=world.tolerance)


def at_rest(teacher: nn.Module, sums: Callable[[], Tensor], *, tolerance: float) -> Check:
    """Whether `sums` are the same twice with a teacher that was left in train mode."""
    teacher.train()
    said = [sums() for _ in range(2)]
    teacher.eval()
    gap = apart(*said)
    good = gap <= tolerance
    return Check.of(
        "teacher at rest",
        good,
        found="the same twice" if good else f"{gap:.1%} apart when it is asked twice",
        why="a teacher with dropout says something else in every step",
        remedy="set its dropout to 0, or mend its eval()",
    )


def passes_add_up(world: World) -> Check:
    """Two passes over half of the documents give the sums of one pass over all."""
    trained, documents = study(world, compute=world.compute), world.batch["documents"][0]
    first = documents <= documents.max() // 2
    parts = [{name: values[:, keep] for name, values in world.batch.items()} for keep in (first, ~first)]
    with torch.no_grad():
        whole = trained(**world.batch)["sums"].double().cpu()
        halves = [trained(**part)["sums"].double().cpu() for part in parts if part["input_ids"].numel()]
    gap = apart(torch.stack(halves).sum(0), whole)
    good = gap <= world.tolerance
    return Check.of(
        "passes add up",
        good,
        found=f"within {gap:.1e}",
        why="means of means weigh short passes too much",
    )


def stop_token_trained(world: World) -> Check | None:
    """What the assistant says ends in a stop token that is trained."""
    if world.kind == "text":
        return None
    good = world.stops >= 0.5
    return Check.of(
        "stop token trained",
        good,
        found=f"in {world.stops:.0%} of the answers",
        why="a student that never learns to stop runs on when it is asked",
        remedy="mend the chat template: behind an answer it must write the end-of-turn token",
    )


def answers_alone_trained(world: World) -> Check | None:
    """In chats something is trained, and not everything."""
    if world.kind == "text":
        return None
    good = 0 < world.trained < 1
    return Check.of(
        "answers alone trained",
        good,
        found=f"{world.trained:.0%} of the tokens",
        why="prompts are given when it is asked; training on them spends the student on writing questions",
        remedy="mend the chat template, which has to mark what the assistant says",
    )


def cache_as_live(world: World) -> Check | None:
    """What the cache says of a pack is what the teacher says of it now, and so are the hidden states that it keeps.

    Of drawn tokens only the average would be.
    """
    if world.cache is None or world.teacher is None:
        return None
    kept, needs = world.cache.manifest, Needs(supervised(world.whole)[0])
    with evaluating(world.teacher), torch.no_grad():
        said = signals(world.teacher, world.whole, needs, vocabulary=world.vocabulary)
        gaps = []
        if not kept.drawn:
            told = world.cache.signals(world.whole, needs)
            gaps.append(mean_by_rows(partial(coarse, forward_kl), told, said, kept.facts.temperature))
        if kept.hidden:
            recalled = Recalled(world.cache, known_head(world.teacher))
            told = recalled.signals(world.whole, needs, vocabulary=world.vocabulary)
            gaps.append(mean_by_rows(forward_kl, told, said))
    if not gaps:
        return None
    gap = max(gaps)
    good = gap <= 0.02
    return Check.of(
        "cache as live",
        good,
        found=f"{gap:.1e} nats apart",
        why="a cache of another teacher or of other text teaches something else",
        remedy="make the cache again with potstill cache",
    )


def mean_by_rows(divergence: Callable[..., Tensor], p: Signals, q: Signals, temperature: float = 1.0) -> float:
    """The mean of D(p, q) over rows, few at a time; q at the temperature at which p was read."""
    parts = [
        divergence(p.logits(theirs), q.logits(ours).float() / temperature)
        for theirs, ours in zip(p.rows.split(64), q.rows.split(64), strict=True)
    ]
    return float(torch.cat(parts).mean())


QUICK: Sequence[Invariant] = (
    same_tokens,
    heads_explained,
    documents_apart,
    loss_as_defined,
    stop_token_trained,
    answers_alone_trained,
    cache_as_live,
)
ALL: Sequence[Invariant] = (
    *QUICK,
    teacher_at_rest,
    certain_teacher,
    zero_for_itself,
    passes_add_up,
    gradient_as_differences,
)
