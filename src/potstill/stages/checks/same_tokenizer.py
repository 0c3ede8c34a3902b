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
from potstill.core.types import Batch, Needs, Objective, Signals, supervised_positions
from potstill.models.eval_mode import eval_mode
from potstill.models.signals import compute_signals, get_constant_head, is_head_reproduced, probe_model, unwrap_model
from potstill.models.tokenizers.vocabulary import count_shared_ids
from potstill.objectives.cross_entropy import CrossEntropy
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops.coarse import coarse_divergence
from potstill.ops.divergence import forward_kl, get_facts
from potstill.stages.checks.inputs import FORWARD_KL, CheckInputs, build_module
from potstill.stages.checks.reference_loss import reference_loss
from potstill.stages.checks.report import FAIL, NOTE, PASS, Check, Invariant, format_values, relative_difference
from potstill.teachers.cached import CachedHiddenStates
from potstill.train.training_module import TrainingModule

SHARED_VOCABULARY = "shared vocabulary"
SHARED_VOCABULARY_REASON = "a divergence compares the two distributions id by id"


def check_shared_vocabulary(inputs: CheckInputs) -> Check | None:
    """Teacher and student read text as the same ids."""
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
    """What is said of a pair whose tokenizers differ under an objective that compares token by token."""
    remedy = f"choose a teacher that has the student's tokenizer, or an objective that compares across: {command}"
    return Check.from_result(SHARED_VOCABULARY, False, finding=str(error), why=SHARED_VOCABULARY_REASON, remedy=remedy)


def check_lm_head_reproduced(inputs: CheckInputs) -> Check:
    """Head, scale and soft-cap, as they are read from the config, give the models' own logits."""
    wrong_roles = [role for role, model in inputs.models.items() if not is_head_reproduced(unwrap_model(model))]
    is_fatal = "student" in wrong_roles
    finding = f"not of the {' and the '.join(wrong_roles)}" if wrong_roles else f"of {' and '.join(inputs.models)}"
    return Check(
        name="LM head reproduced",
        outcome=FAIL if is_fatal else NOTE if wrong_roles else PASS,
        found=finding if is_fatal or not wrong_roles else f"{finding}, whose logits are computed whole",
        why="a head whose scale or soft-cap is ignored trains towards another distribution",
        remedy="choose a student of a family whose head is known" if is_fatal else "",
    )


def check_packing_isolation(inputs: CheckInputs) -> Check:
    """Documents of one pack do not see one another."""
    mixing_roles = [role for role, model in inputs.models.items() if not probe_model(model).supports_packing]
    return Check(
        name="packing isolation",
        outcome=NOTE if mixing_roles else PASS,
        found=f"{' and '.join(mixing_roles)} would mix them: padded instead, slower"
        if mixing_roles
        else "packed, and apart",
        why="attention across documents changes every loss in silence",
    )


def check_loss_matches_reference(inputs: CheckInputs) -> Check:
    """The loss of a pack is what the models' own logits give, document by document, over the ids that are real."""
    with torch.no_grad():
        loss_sums = build_module(inputs, compute_dtype=inputs.compute_dtype)(**inputs.batch)["sums"].double().cpu()
    reference_sums = reference_loss(inputs, inputs.student, compute_dtype=inputs.compute_dtype)
    difference = relative_difference(loss_sums, reference_sums)
    passed = difference <= inputs.tolerance
    finding = (
        f"within {difference:.1e}"
        if passed
        else f"{format_values(loss_sums)} where the definition gives {format_values(reference_sums)}"
    )
    return Check.from_result(
        "loss matches reference",
        passed,
        finding=finding,
        why="packing, shifted labels, soft-caps, padded vocabularies and a teacher that drops out all show here",
    )


def check_finite_differences(inputs: CheckInputs) -> Check:
    """The gradient's own slope is the difference of losses a small step to either side of the weights (in float32).

    A divergence whose gradient is not that of its value (adaptive KL) is replaced by forward KL.
    """
    if not get_facts(inputs.logit_objective.divergence).has_full_gradient:
        inputs = replace(inputs, logit_objective=FORWARD_KL)
    student_copy = copy.deepcopy(inputs.student).float().requires_grad_(True)
    loss = build_module(inputs, student=student_copy)(**inputs.batch)["loss"]
    loss.backward()
    weights = [(p, p.grad) for p in student_copy.parameters() if p.grad is not None]
    expected_slope = sum(float(gradient.double().square().sum()) for _, gradient in weights)
    step = 2e-3 * max(loss.item(), 0.1) / max(expected_slope, 1e-12)
    losses = [_move_and_compute_loss(inputs, student_copy, weights, step_size) for step_size in (step, -2 * step)]
    slope = (losses[0] - losses[1]) / (2 * step)
    passed = abs(slope - expected_slope) <= 0.05 * expected_slope
    return Check.from_result(
        "finite differences",
        passed,
        finding=f"within {abs(slope - expected_slope) / max(expected_slope, 1e-12):.1e}"
        if passed
        else f"{expected_slope:.3g} against {slope:.3g}",
        why="a loss may be right and its gradient wrong",
    )


@torch.no_grad()
def _move_and_compute_loss(
    inputs: CheckInputs, student: nn.Module, weights: Sequence[tuple[Tensor, Tensor]], step_size: float
) -> float:
    for weight, gradient in weights:
        weight.add_(gradient, alpha=step_size)
    return float(reference_loss(inputs, student, compute_dtype=torch.float32).mean()) / len(
        supervised_positions(inputs.batch)[1]
    )


def check_zero_loss_for_a_copy(inputs: CheckInputs) -> Check | None:
    """A student that is its teacher has no loss and no gradient, beside those of cross-entropy on the same text."""
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
        finding=f"loss {kl_loss:.1e}, steepest gradient {kl_gradient:.1e} (cross-entropy's {ce_gradient:.1e})",
        why="a loss that is not least at the teacher pulls the student away from it",
    )


def _measure_loss_and_gradient(inputs: CheckInputs, student: nn.Module, objective: Objective) -> tuple[float, float]:
    """The size of the loss, and of the steepest entry of its gradient."""
    student.zero_grad()
    module = TrainingModule(student, objective, frozen={"teacher": inputs.teacher}, vocabulary=inputs.vocabulary)
    loss = module(**inputs.batch)["loss"]
    loss.backward()
    return abs(loss.item()), max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None)


@dataclass(frozen=True)
class _OneHotTeacher:
    """A teacher that is sure of the text."""

    vocabulary_size: int

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        targets = supervised_positions(batch)[1]
        rows = torch.full((len(targets), self.vocabulary_size), -1e4, device=targets.device)
        return Signals(rows=rows.scatter_(1, targets[:, None], 0.0), logits=lambda chunk: chunk)


def check_one_hot_teacher(inputs: CheckInputs) -> Check:
    """The forward KL to a teacher that is sure of the text is the cross-entropy."""
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
        why="rows and targets that are off by one, or another direction of the divergence, show here",
    )


def check_deterministic_teacher(inputs: CheckInputs) -> Check | None:
    """The teacher says the same twice, whatever mode it was left in."""
    if inputs.teacher is None:
        return None
    module = build_module(inputs, compute_dtype=inputs.compute_dtype)

    def compute_sums() -> Tensor:
        with torch.no_grad():
            return module(**inputs.batch)["sums"].double().cpu()

    return check_repeatability(inputs.teacher, compute_sums, tolerance=inputs.tolerance)


def check_repeatability(teacher: nn.Module, compute_sums: Callable[[], Tensor], *, tolerance: float) -> Check:
    """Whether `sums` are the same twice with a teacher that was left in train mode."""
    teacher.train()
    repeated_sums = [compute_sums() for _ in range(2)]
    teacher.eval()
    difference = relative_difference(*repeated_sums)
    passed = difference <= tolerance
    return Check.from_result(
        "deterministic teacher",
        passed,
        finding="the same twice" if passed else f"{difference:.1%} apart when it is asked twice",
        why="a teacher with dropout says something else in every step",
        remedy="set its dropout to 0, or mend its eval()",
    )


def check_gradient_accumulation(inputs: CheckInputs) -> Check:
    """Two passes over half of the documents give the sums of one pass over all."""
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
        why="means of means weigh short passes too much",
    )


def check_stop_token(inputs: CheckInputs) -> Check | None:
    """What the assistant says ends in a stop token that is trained."""
    if inputs.kind == "text":
        return None
    passed = inputs.stop_share >= 0.5
    return Check.from_result(
        "stop token",
        passed,
        finding=f"in {inputs.stop_share:.0%} of the answers",
        why="a student that never learns to stop runs on when it is asked",
        remedy="mend the chat template to end each answer with a stop token, or add its end-of-turn token to "
        "eos_token_id in generation_config.json",
    )


def check_label_mask(inputs: CheckInputs) -> Check | None:
    """In chats something is trained, and not everything."""
    if inputs.kind == "text":
        return None
    passed = 0 < inputs.trained_share < 1
    return Check.from_result(
        "label mask",
        passed,
        finding=f"{inputs.trained_share:.0%} of the tokens",
        why="prompts are given when it is asked; training on them spends the student on writing questions",
        remedy="mend the chat template, which has to mark what the assistant says",
    )


def check_cache_matches_teacher(inputs: CheckInputs) -> Check | None:
    """What the cache says of a pack is what the teacher says of it now, and so are the hidden states that it keeps.

    Of drawn tokens only the average would be.
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
        why="a cache of another teacher or of other text teaches something else",
        remedy="make the cache again with potstill cache",
    )


def mean_divergence(divergence: Callable[..., Tensor], p: Signals, q: Signals, temperature: float = 1.0) -> float:
    """The mean of D(p, q) over rows, few at a time; q at the temperature at which p was read."""
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
