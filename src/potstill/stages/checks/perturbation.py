"""Checks that make a small change: to a document of a pack, or to the student's weights along the gradient."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from potstill.core.types import Batch, Needs, supervised_positions
from potstill.layers.linear.ternary import set_strength
from potstill.models.dense_experts import dense_experts
from potstill.models.eval_mode import eval_mode
from potstill.models.probing import MAX_MOVE, compute_move
from potstill.models.signals import compute_signals, probe_model
from potstill.ops.divergence import get_facts
from potstill.stages.checks.inputs import FORWARD_KL, CheckInputs, build_module
from potstill.stages.checks.reference_loss import reference_loss
from potstill.stages.checks.report import FAIL, NOTE, PASS, REPORT_REMEDY, Check

STEP_SHRINKAGES = (1.0, 1 / 4, 1 / 16, 1 / 64, 1 / 256)  # of the first step; rounding is still below 5 % at the last
MAX_SLOPE_ERROR = 0.05


def check_packing_isolation(inputs: CheckInputs) -> Check:
    """When one document of a pack changes, nothing in the others moves by more than 2 eps, relative to the largest."""
    padded_roles = [role for role, model in inputs.models.items() if not probe_model(model).supports_packing]
    moves = {role: _measure_move_across_documents(model, inputs.batch) for role, model in inputs.models.items()}
    leaking_roles = [role for role, move in moves.items() if not move <= MAX_MOVE]
    padded_text = (
        f"{' and '.join(padded_roles)} would mix packed documents, so potstill pads their batches, which is slower"
    )
    leak_text = " and ".join(f"in the {role} others move by {moves[role]:.3g} eps" for role in leaking_roles)
    return Check(
        name="packing isolation",
        outcome=FAIL if leaking_roles else NOTE if padded_roles else PASS,
        found=f"{leak_text} when one document changes"
        if leaking_roles
        else padded_text
        if padded_roles
        else f"packed, and others move by at most {max(moves.values()):.2g} eps when one document changes",
        why="attention across documents changes every loss without an error",
        remedy=REPORT_REMEDY if leaking_roles else "",
    )


@torch.no_grad()
def _measure_move_across_documents(model: nn.Module, batch: Batch) -> float:
    """The largest move of a row, in eps, when the first or the last other document of the batch changes."""
    documents = batch["documents"]
    needs, owners = Needs(documents >= 0), documents[documents >= 0]
    with eval_mode(model), dense_experts(model):
        rows = compute_signals(model, batch, needs).rows
        moves = [0.0]
        for number in {int(owners.min()), int(owners.max())} if owners.min() < owners.max() else ():
            other_ids = torch.where(documents == number, batch["input_ids"].flip(1), batch["input_ids"])
            changed_rows = compute_signals(model, {**batch, "input_ids": other_ids}, needs).rows
            moves.append(compute_move(rows[owners != number], changed_rows[owners != number]))
    return max(moves)


def check_finite_differences(inputs: CheckInputs) -> Check:
    """The slope along the gradient is the difference of losses a small step to either side of the weights (float32).

    A stiff model curves within the first step, so the step shrinks before the check fails. A divergence whose gradient
    is not that of its value (adaptive KL) is replaced by forward KL. Ternary weights are not rounded here, since a
    straight-through gradient is not that of the rounded value.
    """
    if not get_facts(inputs.logit_objective.divergence).has_full_gradient:
        inputs = replace(inputs, logit_objective=FORWARD_KL)
    student_copy = copy.deepcopy(inputs.student).float().requires_grad_(True)
    set_strength(student_copy, 0.0)
    loss = build_module(inputs, student=student_copy)(**inputs.batch)["loss"]
    loss.backward()
    gradients = [(p, p.grad) for p in student_copy.parameters() if p.grad is not None]
    expected_slope = sum(float(gradient.double().square().sum()) for _, gradient in gradients)
    first_step = 2e-3 * max(loss.item(), 0.1) / max(expected_slope, 1e-12)
    slope, error = 0.0, math.inf
    for shrinkage in STEP_SHRINKAGES:
        new_slope = _measure_slope(inputs, student_copy, gradients, first_step * shrinkage)
        new_error = abs(new_slope - expected_slope) / max(expected_slope, 1e-12)
        slope, error = min((slope, error), (new_slope, new_error), key=lambda measured: measured[1])
        if error <= MAX_SLOPE_ERROR:
            break
    return Check.from_result(
        "finite differences",
        error <= MAX_SLOPE_ERROR,
        finding=f"within {error:.1e}"
        if error <= MAX_SLOPE_ERROR
        else f"the gradient's slope is {expected_slope:.3g}, that of the loss {slope:.3g}",
        why="a loss can be right while its gradient is wrong",
    )


@torch.no_grad()
def _measure_slope(
    inputs: CheckInputs, student: nn.Module, gradients: Sequence[tuple[Tensor, Tensor]], step: float
) -> float:
    """The central difference of the reference loss along the gradient; the weights return to where they were."""
    weights = [weight.clone() for weight, _ in gradients]
    losses = []
    for size in (step, -step):
        for (weight, gradient), start in zip(gradients, weights, strict=True):
            weight.copy_(start + size * gradient)
        reference_sums = reference_loss(inputs, student, compute_dtype=torch.float32)
        losses.append(float(reference_sums.mean()) / len(supervised_positions(inputs.batch)[1]))
    for (weight, _), start in zip(gradients, weights, strict=True):
        weight.copy_(start)
    return (losses[0] - losses[1]) / (2 * step)
