"""What is examined, the verdict on it, and the plain definition of the loss that everything is compared with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import PotstillError, UnsupportedModel
from potstill.core.types import IGNORE, Batch
from potstill.models.eval_mode import eval_mode
from potstill.models.signals import unwrap_model
from potstill.models.tokenizers.vocabulary import count_shared_ids, count_token_ids
from potstill.objectives.cross_entropy import CrossEntropy
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops.divergence import apply_temperature
from potstill.teachers.cached import TeacherCache
from potstill.train.training_module import TrainingModule

FORWARD_KL = LogitDistillation()
PASS, FAIL, NOTE = "pass", "fail", "note"
REPORT_REMEDY = "report it with the two models' names, and take another pair until it is mended"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One invariant: what it says, what was found, why it matters, and what to do where it fails."""

    name: str
    outcome: str
    found: str
    why: str
    remedy: str = ""

    @classmethod
    def from_result(cls, name: str, passed: bool, *, finding: str, why: str, remedy: str = REPORT_REMEDY) -> "Check":
        """Passed, or failed with what to do."""
        return cls(name=name, outcome=PASS if passed else FAIL, found=finding, why=why, remedy="" if passed else remedy)

    def to_dict(self) -> dict[str, str]:
        """A plain dictionary, for cards and JSON."""
        return {name: value for name, value in asdict(self).items() if value}


@dataclass(frozen=True, kw_only=True)
class CheckInputs:
    """What is checked: two models with their tokenizers, the ids that they share, and some of the text.

    `batch` is a small pack of several short documents and `whole` one pack as it is trained on. `teacher` is None where
    its weights are not here, or where one network is examined by itself, of which `role` says who it is; its loss is
    then cross-entropy alone. `compared` is the divergence that is trained beside it. `stops` is the share of answers
    that end in a trained stop token, and `trained` the share of tokens that are trained on.
    """

    student: PreTrainedModel
    student_tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel | None
    teacher_tokenizer: PreTrainedTokenizerBase | None
    vocabulary: int
    batch: Batch
    full_pack: Batch
    kind: str
    stop_share: float
    trained_share: float
    compute_dtype: torch.dtype = torch.float32
    cache: TeacherCache | None = None
    role: str = "student"
    logit_objective: LogitDistillation = FORWARD_KL

    @property
    def tolerance(self) -> float:
        """The relative difference that rounding explains: the dtype's, or that of a softmax over many ids.

        A float32 softmax adds up V exponentials one after another in 16 lanes, each sum rounded by half an eps.
        """
        softmax = self.vocabulary / 16 * torch.finfo(torch.float32).eps / 2
        return float(max(torch.finfo(self.compute_dtype).eps ** (2 / 3), softmax))

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """Those that are here, by their role."""
        return {self.role: self.student, **({} if self.teacher is None else {"teacher": self.teacher})}


Invariant = Callable[[CheckInputs], Check | None]
Inputs = TypeVar("Inputs")


def run_checks(inputs: Inputs, checks: Sequence[Callable[[Inputs], Check | None]]) -> Iterator[Check]:
    """What each check that applies finds; one that cannot be asked has failed."""
    for check in checks:
        try:
            result = check(inputs)
        except PotstillError as error:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            result = Check(name=name, outcome=FAIL, found=str(error), why="training will ask the same")
        if result is not None:
            yield result


def build_module(
    inputs: CheckInputs, *, student: Any = None, compute_dtype: torch.dtype = torch.float32
) -> TrainingModule:
    """Half cross-entropy, half the divergence, as it is trained: chunked, packed and cut to the shared ids."""
    has_no_teacher = inputs.teacher is None
    objective = (
        WeightedSum((1.0, CrossEntropy()))
        if has_no_teacher
        else WeightedSum((0.5, CrossEntropy()), (0.5, inputs.logit_objective))
    )
    frozen = {"teacher": inputs.teacher} if inputs.teacher is not None else {}
    trained_model = inputs.student if student is None else student
    return TrainingModule(
        trained_model, objective, frozen=frozen, vocabulary=inputs.vocabulary, compute_dtype=compute_dtype
    )


@torch.no_grad()
def reference_loss(inputs: CheckInputs, student: nn.Module, *, compute_dtype: torch.dtype) -> Tensor:
    """Cross-entropy and, of a pair, the divergence, summed, from the models' own logits of each document, float64."""
    divergence = apply_temperature(inputs.logit_objective.divergence, inputs.logit_objective.temperature)
    num_ids, models = _count_shared_ids(inputs), [student, *([] if inputs.teacher is None else [inputs.teacher])]
    sums = torch.zeros(len(models), dtype=torch.float64)
    for document in inputs.batch["documents"].unique():
        in_document = inputs.batch["documents"][0] == document
        ids, labels = inputs.batch["input_ids"][:, in_document], inputs.batch["labels"][0, in_document]
        rows, targets = labels[1:] != IGNORE, labels[1:][labels[1:] != IGNORE].cpu()
        log_q, *teacher_log_probs = (_compute_log_probs(model, ids, num_ids, compute_dtype)[rows] for model in models)
        sums[0] -= log_q.gather(-1, targets[:, None]).sum()
        for log_p in teacher_log_probs:
            sums[1] += divergence(log_p, log_q).sum()
    return sums


def _count_shared_ids(inputs: CheckInputs) -> int:
    """The ids that stand for a token, of a pair for the same one."""
    if inputs.teacher is None:
        return min(
            count_token_ids(inputs.student_tokenizer), inputs.vocabulary
        )  # a teacher that is not here may know fewer
    if inputs.teacher_tokenizer is None:
        raise UnsupportedModel("the teacher's tokenizer is not here, so its loss cannot be defined")
    return count_shared_ids(inputs.teacher_tokenizer, inputs.student_tokenizer)


def _compute_log_probs(model: nn.Module, ids: Tensor, num_ids: int, compute_dtype: torch.dtype) -> Tensor:
    """log softmax of a model's own logits of one document, over the real ids, without those of its last token."""
    causal_lm = unwrap_model(model)
    use_autocast = compute_dtype != torch.float32 and causal_lm.dtype == torch.float32
    with eval_mode(causal_lm), torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=use_autocast):
        logits = causal_lm(input_ids=ids, use_cache=False).logits
    return logits[0, :-1, :num_ids].double().log_softmax(-1).cpu()


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value: a small divergence is as uncertain as a large one."""
    return float((a - b).abs().max() / torch.maximum(a.abs().max(), b.abs().max()).clamp_min(1e-9))


def format_values(values: Tensor) -> str:
    """Values for people."""
    return " and ".join(f"{value:.4g}" for value in values.tolist())
