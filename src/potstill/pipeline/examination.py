"""What is examined, the verdict on it, and the plain definition of the loss that everything is compared with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import PotstillError, UnsupportedModel
from potstill.core.types import IGNORE, Batch
from potstill.data.cache import Cache
from potstill.models.evaluating import evaluating
from potstill.models.signals import plain
from potstill.models.vocabulary import real_ids, shared_ids
from potstill.objectives.combine import Sum
from potstill.objectives.distill import Distill
from potstill.objectives.language import CrossEntropy
from potstill.ops.divergence import tempered
from potstill.train.study import Study

FORWARD_KL = Distill()
PASS, FAIL, NOTE = "pass", "fail", "note"
REPORT = "report it with the two models' names, and take another pair until it is mended"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One invariant: what it says, what was found, why it matters, and what to do where it fails."""

    name: str
    outcome: str
    found: str
    why: str
    remedy: str = ""

    @classmethod
    def of(cls, name: str, good: bool, *, found: str, why: str, remedy: str = REPORT) -> "Check":
        """Passed, or failed with what to do."""
        return cls(name=name, outcome=PASS if good else FAIL, found=found, why=why, remedy="" if good else remedy)

    def to_dict(self) -> dict[str, str]:
        """A plain dictionary, for cards and JSON."""
        return {name: value for name, value in asdict(self).items() if value}


@dataclass(frozen=True, kw_only=True)
class World:
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
    whole: Batch
    kind: str
    stops: float
    trained: float
    compute: torch.dtype = torch.float32
    cache: Cache | None = None
    role: str = "student"
    compared: Distill = FORWARD_KL

    @property
    def tolerance(self) -> float:
        """The relative difference that rounding explains: the dtype's, or that of a softmax over many ids.

        A float32 softmax adds up V exponentials one after another in 16 lanes, each sum rounded by half an eps.
        """
        softmax = self.vocabulary / 16 * torch.finfo(torch.float32).eps / 2
        return float(max(torch.finfo(self.compute).eps ** (2 / 3), softmax))

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """Those that are here, by their role."""
        return {self.role: self.student, **({} if self.teacher is None else {"teacher": self.teacher})}


Invariant = Callable[[World], Check | None]
Examined = TypeVar("Examined")


def examine(world: Examined, checks: Sequence[Callable[[Examined], Check | None]]) -> Iterator[Check]:
    """What each check that applies finds; one that cannot be asked has failed."""
    for check in checks:
        try:
            found = check(world)
        except PotstillError as error:
            name = check.__name__.replace("_", " ")
            found = Check(name=name, outcome=FAIL, found=str(error), why="training will ask the same")
        if found is not None:
            yield found


def study(world: World, *, student: Any = None, compute: torch.dtype = torch.float32) -> Study:
    """Half cross-entropy, half the divergence, as it is trained: chunked, packed and cut to the shared ids."""
    alone = world.teacher is None
    objective = Sum((1.0, CrossEntropy())) if alone else Sum((0.5, CrossEntropy()), (0.5, world.compared))
    frozen = {"teacher": world.teacher} if world.teacher is not None else {}
    learns = world.student if student is None else student
    return Study(learns, objective, frozen=frozen, vocabulary=world.vocabulary, compute_dtype=compute)


@torch.no_grad()
def defined(world: World, student: nn.Module, *, compute: torch.dtype) -> Tensor:
    """Cross-entropy and, of a pair, the divergence, summed, from the models' own logits of each document, float64."""
    divergence = tempered(world.compared.divergence, world.compared.temperature)
    real, models = _real(world), [student, *([] if world.teacher is None else [world.teacher])]
    sums = torch.zeros(len(models), dtype=torch.float64)
    for document in world.batch["documents"].unique():
        mine = world.batch["documents"][0] == document
        ids, labels = world.batch["input_ids"][:, mine], world.batch["labels"][0, mine]
        rows, targets = labels[1:] != IGNORE, labels[1:][labels[1:] != IGNORE].cpu()
        log_q, *others = (_log_probabilities(model, ids, real, compute)[rows] for model in models)
        sums[0] -= log_q.gather(-1, targets[:, None]).sum()
        for log_p in others:
            sums[1] += divergence(log_p, log_q).sum()
    return sums


def _real(world: World) -> int:
    """The ids that stand for a token, of a pair for the same one."""
    if world.teacher is None:
        return min(real_ids(world.student_tokenizer), world.vocabulary)  # a teacher that is not here may know fewer
    if world.teacher_tokenizer is None:
        raise UnsupportedModel("the teacher's tokenizer is not here, so its loss cannot be defined")
    return shared_ids(world.teacher_tokenizer, world.student_tokenizer)


def _log_probabilities(model: nn.Module, ids: Tensor, real: int, compute: torch.dtype) -> Tensor:
    """log softmax of a model's own logits of one document, over the real ids, without those of its last token."""
    inner = plain(model)
    halved = compute != torch.float32 and inner.dtype == torch.float32
    with evaluating(inner), torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=halved):
        logits = inner(input_ids=ids, use_cache=False).logits
    return logits[0, :-1, :real].double().log_softmax(-1).cpu()


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value: a small divergence is as uncertain as a large one."""
    return float((a - b).abs().max() / torch.maximum(a.abs().max(), b.abs().max()).clamp_min(1e-9))


def rounded(values: Tensor) -> str:
    """Values for people."""
    return " and ".join(f"{value:.4g}" for value in values.tolist())
