"""The checks of a pair with one tokenizer: the loss that training computes against a plain and slow definition of it.

Each check is a function `CheckInputs -> Check | None`, None where it does not apply. Its tolerance is eps^(2/3) of the
value in the compute dtype (2e-5 in float32, 4 % in bfloat16), or what a float32 softmax over that many ids loses (1e-3
for 262,144), whichever is larger.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from potstill.core.errors import VocabularyMismatch
from potstill.core.types import Batch, Needs, Objective, Signals, supervised_positions
from potstill.models.eval_mode import eval_mode
from potstill.models.signals import (
    compute_signals,
    get_constant_head,
    is_output_layer_reproduced,
    unwrap_model,
)
from potstill.models.tokenizers.vocabulary import count_shared_ids
from potstill.objectives.cross_entropy import CrossEntropy
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops.coarse import coarse_divergence
from potstill.ops.divergence import forward_kl
from potstill.stages.checks.inputs import FORWARD_KL, CheckInputs, build_module
from potstill.stages.checks.perturbation import check_finite_differences, check_packing_isolation
from potstill.stages.checks.reference_loss import reference_loss
from potstill.stages.checks.report import (
    FAIL,
    NOTE,
    PASS,
    Check,
    Invariant,
    format_values,
    relative_difference,
)
from potstill.stages.checks.stopping import check_stop_token
from potstill.teachers.cached_states import CachedHiddenStates
from potstill.train.training_module import TrainingModule

SHARED_VOCABULARY = "shared vocabulary"
SHARED_VOCABULARY_REASON = "a divergence compares the two distributions id by id"


def check_shared_vocabulary(inputs: CheckInputs) -> Check | None:
    """Teacher and student give the same ids to the same text."""
    if inputs.teacher_tokenizer is None:
        return None
    num_shared = count_shared_ids(inputs.teacher_tokenizer, inputs.student_tokenizer)
    widths = {
        role: unwrap_model(model).get_output_embeddings().weight.shape[0] for role, model in inputs.models.items()
    }
    padded_heads = [f"{role}'s head of {width:,}" for role, width in widths.items() if width > num_shared]
    cut_text = f"; cut to them: {' and '.join(padded_heads)}" if padded_heads else ""
    return Check.from_result(
        SHARED_VOCABULARY, True, finding=f"{num_shared:,} ids shared{cut_text}", why=SHARED_VOCABULARY_REASON
    )


def report_vocabulary_mismatch(error: VocabularyMismatch, *, command: str) -> Check:
    """The failed check for a pair with two tokenizers under an objective that compares token by token."""
    remedy = f"choose a teacher with the student's tokenizer, or an objective that compares across: {command}"
    return Check.from_result(SHARED_VOCABULARY, False, finding=str(error), why=SHARED_VOCABULARY_REASON, remedy=remedy)


def check_lm_head_reproduced(inputs: CheckInputs) -> Check:
    """The head, with scale and soft-cap from the config, gives the model's own logits."""
    wrong_roles = [role for role, model in inputs.models.items() if not is_output_layer_reproduced(unwrap_model(model))]
    is_fatal = "student" in wrong_roles
    finding = f"not of the {' and the '.join(wrong_roles)}" if wrong_roles else f"of {' and '.join(inputs.models)}"
    return Check(
        name="LM head reproduced",
        outcome=FAIL if is_fatal else NOTE if wrong_roles else PASS,
        found=finding if is_fatal or not wrong_roles else f"{finding}, whose logits the model computes itself",
        why="a loss that ignores a head's scale or soft-cap trains towards another distribution",
        remedy="choose a student from a family whose head is a linear layer" if is_fatal else "",
    )


def check_loss_matches_reference(inputs: CheckInputs) -> Check:
    """The packed loss is what the models' own logits give, document by document, over the real ids."""
    with torch.no_grad():
        loss_sums = build_module(inputs, compute_dtype=inputs.compute_dtype)(**inputs.batch)["sums"].double().cpu()
    reference_sums = reference_loss(inputs, inputs.student, compute_dtype=inputs.compute_dtype)
    difference = relative_difference(loss_sums, reference_sums)
    passed = difference <= inputs.tolerance
    finding = (
        f"within {difference:.1e}"
        if passed
        else f"{format_values(loss_sums)}, and the definition gives {format_values(reference_sums)}"
    )
    return Check.from_result(
        "loss matches reference",
        passed,
        finding=finding,
        why="this finds errors in packing, shifted labels, soft-caps, padded vocabularies, and dropout in the teacher",
    )


def check_zero_loss_for_a_copy(inputs: CheckInputs) -> Check | None:
    """A student that equals its teacher has no loss and no gradient, relative to cross-entropy's on the same text."""
    if inputs.teacher is None:
        return None
    teacher_copy = copy.deepcopy(unwrap_model(inputs.teacher)).requires_grad_(True)
    (kl_loss, kl_gradient), (ce_loss, ce_gradient) = (
        _measure_loss_and_gradient(inputs, teacher_copy, objective)
        for objective in (inputs.logit_objective, CrossEntropy())
    )
    passed = kl_loss <= inputs.tolerance * max(1, ce_loss) and kl_gradient <= inputs.tolerance * max(1, ce_gradient)
    return Check.from_result(
        "zero loss for a copy",
        passed,
        finding=f"loss {kl_loss:.1e}, largest gradient {kl_gradient:.1e} (cross-entropy's {ce_gradient:.1e})",
        why="a loss whose minimum is elsewhere pulls the student away from the teacher",
    )


def _measure_loss_and_gradient(inputs: CheckInputs, student: nn.Module, objective: Objective) -> tuple[float, float]:
    """The size of the loss, and of the largest entry of its gradient."""
    student.zero_grad()
    module = TrainingModule(student, objective, frozen={"teacher": inputs.teacher}, vocabulary=inputs.vocabulary)
    loss = module(**inputs.batch)["loss"]
    loss.backward()
    return abs(loss.item()), max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None)


@dataclass(frozen=True)
class _OneHotTeacher:
    """A teacher that gives each target the probability 1."""

    vocabulary_size: int

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        targets = supervised_positions(batch)[1]
        rows = torch.full((len(targets), self.vocabulary_size), -1e4, device=targets.device)
        return Signals(rows=rows.scatter_(1, targets[:, None], 0.0), logits=lambda chunk: chunk)


def check_one_hot_teacher(inputs: CheckInputs) -> Check:
    """The forward KL from a one-hot teacher is the cross-entropy."""
    objective = WeightedSum((0.5, CrossEntropy()), (0.5, FORWARD_KL))
    module = TrainingModule(
        inputs.student, objective, frozen={"teacher": _OneHotTeacher(inputs.vocabulary)}, vocabulary=inputs.vocabulary
    )
    with torch.no_grad():
        cross_entropy, kl = module(**inputs.batch)["sums"].double().cpu()
    passed = relative_difference(cross_entropy, kl) <= inputs.tolerance
    return Check.from_result(
        "one-hot teacher",
        passed,
        finding=f"within {relative_difference(cross_entropy, kl):.1e}",
        why="this finds rows and targets that are off by one, and a divergence in the wrong direction",
    )


def check_deterministic_teacher(inputs: CheckInputs) -> Check | None:
    """The teacher gives the same loss twice, even if it was left in train mode."""
    if inputs.teacher is None:
        return None
    module = build_module(inputs, compute_dtype=inputs.compute_dtype)

    def compute_sums() -> Tensor:
        with torch.no_grad():
            return module(**inputs.batch)["sums"].double().cpu()

    return check_repeatability(inputs.teacher, compute_sums, tolerance=inputs.tolerance)


def check_repeatability(teacher: nn.Module, compute_sums: Callable[[], Tensor], *, tolerance: float) -> Check:
    """Whether `compute_sums` gives the same twice with a teacher that was left in train mode."""
    teacher.train()
    repeated_sums = [compute_sums() for _ in range(2)]
    teacher.eval()
    difference = relative_difference(*repeated_sums)
    passed = difference <= tolerance
    return Check.from_result(
        "deterministic teacher",
        passed,
        finding="the same twice" if passed else f"two passes differ by {difference:.1%}",
        why="a teacher with active dropout gives other targets in every step",
        remedy="set its dropout to 0, or correct its eval()",
    )


def check_gradient_accumulation(inputs: CheckInputs) -> Check:
    """Two passes over half of the documents each give the sums of one pass over all."""
    module, documents = build_module(inputs, compute_dtype=inputs.compute_dtype), inputs.batch["documents"][0]
    in_first_half = documents <= documents.max() // 2
    parts = [
        {name: values[:, mask] for name, values in inputs.batch.items()} for mask in (in_first_half, ~in_first_half)
    ]
    with torch.no_grad():
        total_sums = module(**inputs.batch)["sums"].double().cpu()
        half_sums = [module(**part)["sums"].double().cpu() for part in parts if part["input_ids"].numel()]
    difference = relative_difference(torch.stack(half_sums).sum(0), total_sums)
    passed = difference <= inputs.tolerance
    return Check.from_result(
        "gradient accumulation",
        passed,
        finding=f"within {difference:.1e}",
        why="a mean of means gives short passes too much weight",
    )


def check_label_mask(inputs: CheckInputs) -> Check | None:
    """In chats some tokens are trained on, and not all."""
    if inputs.kind == "text":
        return None
    passed = 0 < inputs.trained_share < 1
    return Check.from_result(
        "label mask",
        passed,
        finding=f"{inputs.trained_share:.0%} of the tokens",
        why="training on prompts teaches the student to write questions",
        remedy="correct the chat template: it has to mark the assistant's tokens",
    )


def check_cache_matches_teacher(inputs: CheckInputs) -> Check | None:
    """The cached distributions of a pack are the teacher's of today, and so are the hidden states that it keeps.

    A cache of sampled tokens agrees on average only, so its distributions are not compared.
    """
    if inputs.cache is None or inputs.teacher is None:
        return None
    manifest, needs = inputs.cache.manifest, Needs(supervised_positions(inputs.full_pack)[0])
    with eval_mode(inputs.teacher), torch.no_grad():
        teacher_signals = compute_signals(inputs.teacher, inputs.full_pack, needs, vocabulary=inputs.vocabulary)
        differences = []
        if not manifest.is_sampled:
            cached_signals = inputs.cache.signals(inputs.full_pack, needs)
            differences.append(
                mean_divergence(
                    partial(coarse_divergence, forward_kl), cached_signals, teacher_signals, manifest.facts.temperature
                )
            )
        if manifest.hidden:
            cached_states = CachedHiddenStates(inputs.cache, get_constant_head(inputs.teacher))
            cached_signals = cached_states.signals(inputs.full_pack, needs, vocabulary=inputs.vocabulary)
            differences.append(mean_divergence(forward_kl, cached_signals, teacher_signals))
    if not differences:
        return None
    difference = max(differences)
    passed = difference <= 0.02
    return Check.from_result(
        "cache matches teacher",
        passed,
        finding=f"{difference:.1e} nats apart",
        why="a cache of another teacher or of other text gives wrong targets",
        remedy="make the cache again with potstill cache",
    )


def mean_divergence(divergence: Callable[..., Tensor], p: Signals, q: Signals, temperature: float = 1.0) -> float:
    """The mean of D(p, q) over rows, 64 at a time; q at the temperature at which p was computed."""
    divergences = [
        divergence(p.logits(p_rows), q.logits(q_rows).float() / temperature)
        for p_rows, q_rows in zip(p.rows.split(64), q.rows.split(64), strict=True)
    ]
    return float(torch.cat(divergences).mean())


QUICK_CHECKS: Sequence[Invariant] = (
    check_shared_vocabulary,
    check_lm_head_reproduced,
    check_packing_isolation,
    check_loss_matches_reference,
    check_stop_token,
    check_label_mask,
    check_cache_matches_teacher,
)
ALL_CHECKS: Sequence[Invariant] = (
    *QUICK_CHECKS,
    check_deterministic_teacher,
    check_one_hot_teacher,
    check_zero_loss_for_a_copy,
    check_gradient_accumulation,
    check_finite_differences,
)
