"""Checks of an alignment before it trains, on its own policy, loss and data: `potstill doctor` runs the same.

Each check is a function `AlignCheckInputs -> Check | None`, None where it does not apply.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from potstill.core.screen import status
from potstill.core.types import IGNORE, REFERENCE, SAMPLING_LOG_P, Batch, Needs, move_batch, supervised_positions
from potstill.data.pack_fields import OFFSETS, SIDES
from potstill.data.packing import Packs, collate
from potstill.decode.stop_tokens import find_stop_tokens
from potstill.models.eval_mode import eval_mode
from potstill.models.inference import inference_context
from potstill.models.load import LoadedModel
from potstill.models.signals import compute_signals, unwrap_model
from potstill.objectives.grpo import read_tokens
from potstill.objectives.row_terms import compute_target_log_probs
from potstill.objectives.spec import TrainingData
from potstill.ops.likelihood import sum_groups
from potstill.stages.checks import report, same_tokenizer
from potstill.stages.checks.inputs import CheckInputs
from potstill.stages.checks.report import Check, raise_if_failed, relative_difference
from potstill.stages.checks.stopping import check_stop_token
from potstill.train.frozen_view import FrozenView
from potstill.train.training_module import TrainingModule

NUM_PACKS = 2  # packs that are checked
NUM_ANSWERS = 4  # answers that are also computed one by one
GAPS = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # between decoding and training, in nats
MARGINS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of a policy and a copy of it, that rounding explains


@dataclass(frozen=True, kw_only=True)
class AlignCheckInputs:
    """The module to train, the policy that it trains, and the packs of the training.

    Of prompts these are packs of answers that the policy sampled at the `temperature`.
    """

    module: TrainingModule
    policy: LoadedModel
    packs: Packs
    temperature: float = 1.0

    @cached_property
    def batches(self) -> list[Batch]:
        """The first packs, each a batch on the device of the policy."""
        device = next(self.module.student.parameters()).device
        batches = (collate([self.packs[number]]) for number in range(min(NUM_PACKS, len(self.packs))))
        return [move_batch(batch, device) for batch in batches]

    @cached_property
    def answers(self) -> list[Tensor]:
        """The labels of each answer of the first packs."""
        return [
            batch["labels"][batch["documents"] == number]
            for batch in self.batches
            for number in (batch[SIDES.name] >= 0).nonzero()[:, 0].tolist()
        ]

    @cached_property
    def pair_inputs(self) -> CheckInputs:
        """The same for checks of a model and its text alone."""
        stops = find_stop_tokens(self.policy.model, self.policy.tokenizer)
        ends = [int(labels[labels != IGNORE][-1]) in stops for labels in self.answers]
        return CheckInputs(
            student=unwrap_model(self.module.student),
            student_tokenizer=self.policy.tokenizer,
            teacher=None,
            teacher_tokenizer=None,
            vocabulary=self.policy.vocabulary,
            batch=self.batches[0],
            full_pack=self.batches[0],
            kind="chat",
            stop_share=sum(ends) / max(1, len(ends)),
            trained_share=self.packs.num_trained / self.packs.num_tokens,
            compute_dtype=self.module.compute_dtype,
            role="model",
        )


@status("checking the loss")
def run_checks(data: TrainingData, inputs: AlignCheckInputs) -> list[dict[str, str]]:
    """The records of the checks, for the card.

    Raises: CheckFailed with the first check that does not pass.
    """
    return raise_if_failed(list_checks(data, inputs))


def list_checks(data: TrainingData, inputs: AlignCheckInputs) -> list[Check]:
    """The results of all checks that apply to an objective which reads this kind of data."""
    return list(report.run_checks(inputs, CHECKS[data]))


def check_lm_head_reproduced(inputs: AlignCheckInputs) -> Check:
    """The head, with scale and soft-cap from the config, gives the model's own logits."""
    return same_tokenizer.check_lm_head_reproduced(inputs.pair_inputs)


def check_stop_tokens(inputs: AlignCheckInputs) -> Check | None:
    """Answers end in a stop token that is trained on."""
    return check_stop_token(inputs.pair_inputs)


def check_packing_isolation(inputs: AlignCheckInputs) -> Check:
    """An answer in a pack, behind a shared prompt and beside other answers, is as likely as on its own."""
    model, batch, dtype = unwrap_model(inputs.module.student), inputs.batches[0], inputs.module.compute_dtype
    numbers = (batch[SIDES.name] >= 0).nonzero()[:NUM_ANSWERS, 0].tolist()
    with inference_context(model, dtype=dtype):
        packed = compute_answer_log_probs(model, batch, inputs.policy.vocabulary)[numbers]
        single = torch.cat(
            [
                compute_answer_log_probs(model, extract_answer(batch, number), inputs.policy.vocabulary)
                for number in numbers
            ]
        )
    difference = relative_difference(packed, single)
    passed = difference <= inputs.pair_inputs.tolerance
    return Check.from_result(
        "packing isolation",
        passed,
        finding=f"an answer in a pack is as likely as alone, within {difference:.1e}",
        why="attention across answers, or a shared prompt that is not seen, changes every loss without an error",
    )


def compute_answer_log_probs(model: torch.nn.Module, batch: Batch, vocabulary: int) -> Tensor:
    """log p of the answer of each document of a batch, in nats; 0 for a document without one."""
    positions, targets, owners = supervised_positions(batch)
    signals = compute_signals(model, batch, Needs(positions), vocabulary=vocabulary)
    total = int(batch["documents"].max()) + 1
    return sum_groups(compute_target_log_probs(signals, targets).double(), owners, total)


def extract_answer(batch: Batch, number: int) -> Batch:
    """A document of a packed batch alone, with the whole prompt that it shares before it."""
    documents = batch["documents"][0]
    is_in_document = documents == number
    ids, labels = batch["input_ids"][0][is_in_document], batch["labels"][0][is_in_document]
    offset = int(batch[OFFSETS.name][number]) if OFFSETS.name in batch else 0
    if offset:
        starts = [n for n in range(number) if not int(batch[OFFSETS.name][n])]
        prompt = batch["input_ids"][0][documents == starts[-1]][:offset]
        ids = torch.cat([prompt, ids])
        labels = torch.cat([torch.full_like(prompt, IGNORE), labels])
    positions = torch.arange(len(ids), device=ids.device)
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions, "documents": torch.zeros_like(ids)}
    return {name: values[None] for name, values in columns.items()}


@torch.no_grad()
def check_decoding(inputs: AlignCheckInputs) -> Check:
    """The decoder gives sampled tokens the probabilities that training gives them."""
    module, gaps = inputs.module, []
    for batch in inputs.batches:
        positions, targets, _ = supervised_positions(batch)
        with eval_mode(module.student), module.autocast(positions.device):
            signals = compute_signals(module.student, batch, Needs(positions), vocabulary=inputs.policy.vocabulary)
            log_p = compute_target_log_probs(signals, targets, temperature=inputs.temperature)
        gaps.append((log_p - read_tokens(batch, SAMPLING_LOG_P, positions)).abs())
    gap = float(torch.cat(gaps).mean())
    return Check.from_result(
        "decoding agrees with training",
        gap <= GAPS.get(module.compute_dtype, GAPS[torch.bfloat16]),
        finding=f"log-probabilities of sampled tokens differ by {gap:.1e} nats",
        why="samples of another distribution make a policy gradient wrong without an error",
    )


def check_zero_margin_for_a_copy(inputs: AlignCheckInputs) -> Check | None:
    """A policy in training and a frozen copy of it prefer no answer, so that DPO's loss is log 2."""
    module = inputs.module
    if REFERENCE not in module.frozen_networks:
        return None
    module_and_copy = module.with_frozen({REFERENCE: FrozenView(module.student, module.compute_dtype)})
    terms = dict(zip(module_and_copy.term_names, mean_terms(module_and_copy, inputs.batches), strict=True))
    margins = [abs(value) for name, value in terms.items() if name.endswith("margin")]
    if not margins:
        return None
    largest = max(margins)
    losses = [value for name, value in terms.items() if module_and_copy.objective.weights[name]]
    log_2 = ", and the loss is log 2" if abs(losses[0] - math.log(2)) < MARGINS[torch.bfloat16] else ""
    return Check.from_result(
        "zero margin for a copy",
        largest <= MARGINS.get(module.compute_dtype, MARGINS[torch.bfloat16]),
        finding=f"margin {largest:.1e}{log_2}",
        why="dropout, or a reference in another precision, would be learned as a preference",
        remedy="report it with the name of the model; --skip-doctor trains nevertheless",
    )


def check_gradient_accumulation(inputs: AlignCheckInputs) -> Check | None:
    """Two passes over one pack each give the sums of one pass over both."""
    if len(inputs.batches) < NUM_PACKS:
        return None
    device = inputs.batches[0]["input_ids"].device
    joint_batch = move_batch(collate([inputs.packs[number] for number in range(NUM_PACKS)]), device)
    total = compute_sums(inputs.module, joint_batch)
    parts = torch.stack([compute_sums(inputs.module, batch) for batch in inputs.batches]).sum(0)
    difference = relative_difference(parts, total)
    return Check.from_result(
        "gradient accumulation",
        difference <= inputs.pair_inputs.tolerance,
        finding=f"within {difference:.1e}",
        why="a mean of means gives short passes too much weight",
    )


@torch.no_grad()
def compute_sums(module: TrainingModule, batch: Batch) -> Tensor:
    """The sums of all terms over a batch, in train mode."""
    sums: Tensor = module.train()(**batch)["sums"].double().cpu()
    return sums


def mean_terms(module: TrainingModule, batches: Sequence[Batch]) -> Iterator[float]:
    """The mean of each term over the batches."""
    sums = torch.stack([compute_sums(module, batch) for batch in batches]).sum(0)
    counts = torch.stack([module.counts(batch) for batch in batches]).sum(0)
    yield from (sums / counts.clamp(min=1)).tolist()


AlignCheck = Callable[[AlignCheckInputs], Check | None]
ANSWER_CHECKS: Sequence[AlignCheck] = (
    check_lm_head_reproduced,
    check_packing_isolation,
    check_stop_tokens,
    check_zero_margin_for_a_copy,
    check_gradient_accumulation,
)
CHECKS: Mapping[TrainingData, Sequence[AlignCheck]] = {
    "preferences": ANSWER_CHECKS,
    "labels": ANSWER_CHECKS,
    "prompts": (check_lm_head_reproduced, check_packing_isolation, check_decoding),
}
