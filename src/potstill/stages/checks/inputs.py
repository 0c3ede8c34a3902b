"""The inputs of the checks, made from the packs of the training: a pair with one tokenizer, or with two."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.types import IGNORE, Batch, get_view, move_batch
from potstill.data.cross_tokenizer.packs import TokenizerInfo, compute_aligned_share
from potstill.data.packing import Pack, Packs, collate
from potstill.decode.stop_tokens import find_stop_tokens
from potstill.models.load import LoadedModel
from potstill.objectives.cross_entropy import CrossEntropy
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.weighted_sum import WeightedSum
from potstill.stages.model_pair import ModelPair
from potstill.teachers.cached import TeacherCache
from potstill.train.training_module import TrainingModule

MAX_SAMPLED = 16  # packs, and documents of them, that are checked

NUM_DOCUMENTS, MAX_DOCUMENT_TOKENS = 3, 48  # of the small batch: enough for packing to show, and a second on a laptop

FORWARD_KL = LogitDistillation()


@dataclass(frozen=True, kw_only=True)
class CheckInputs:
    """Two models with their tokenizers, the number of ids that they share, and some of the text.

    `batch` is a small pack of several short documents, `full_pack` a pack of the training. `teacher` is None if its
    weights are not loaded, or for a check of one model; the loss is then cross-entropy only, and `role` names the
    model. `logit_objective` is the divergence in addition to cross-entropy. `stop_share` is the share of answers that
    end in a trained stop token, `trained_share` the share of trained tokens.
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

        A float32 softmax adds V exponentials in 16 lanes, and each sum is rounded by half an eps.
        """
        softmax = self.vocabulary / 16 * torch.finfo(torch.float32).eps / 2
        return float(max(torch.finfo(self.compute_dtype).eps ** (2 / 3), softmax))

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The models in memory by role."""
        return {self.role: self.student, **({} if self.teacher is None else {"teacher": self.teacher})}


@dataclass(frozen=True, kw_only=True)
class CrossTokenizerInputs:
    """Both models with their own inputs, the module to train, and some of the text in both tokenizers.

    `documents` are short ones, each a batch; `batch` holds the same ones in one pass. `full_packs` are packs of the
    training, on the CPU; `aligned_share` is the share of their trained tokens that are aligned.
    """

    student: CheckInputs
    teacher: CheckInputs
    readers: tuple[TokenizerInfo, TokenizerInfo]
    module: TrainingModule
    documents: Sequence[Batch]
    batch: Batch
    full_packs: Batch
    aligned_share: float

    @property
    def model_views(self) -> Iterator[tuple[Batch, TokenizerInfo]]:
        """Each model's view of the packs, with its tokenizer."""
        return zip((get_view(self.full_packs, name) for name in ("student", "teacher")), self.readers, strict=True)


def build_check_inputs(
    packs: Packs,
    *,
    student: PreTrainedModel,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    kind: str,
    compute_dtype: torch.dtype,
    cache: TeacherCache | None = None,
    logit_objective: LogitDistillation = FORWARD_KL,
) -> CheckInputs:
    """The inputs of the checks, from the packs of the training."""
    return CheckInputs(
        student=student,
        student_tokenizer=student_tokenizer,
        teacher=teacher,
        teacher_tokenizer=teacher_tokenizer,
        vocabulary=vocabulary,
        batch=move_batch(collate(sample_documents(packs)), student.device),
        full_pack=move_batch(collate([packs[0]]), student.device),
        kind=kind,
        stop_share=compute_stop_share(packs, find_stop_tokens(student, student_tokenizer)),
        trained_share=packs.num_trained / (packs.num_tokens - len(packs.lengths)),
        compute_dtype=compute_dtype,
        cache=cache,
        logit_objective=logit_objective,
    )


def build_cross_tokenizer_inputs(
    pair: ModelPair, packs: Packs, module: TrainingModule, *, kind: str
) -> CrossTokenizerInputs:
    """The inputs of the checks for two tokenizers, from the packs and the module of the training."""
    teacher, paired_packs, device = pair.teacher, pair.prepare_packs(packs), pair.student.device
    vocabularies = module.vocabulary
    assert isinstance(teacher, LoadedModel)
    assert isinstance(vocabularies, Mapping)
    documents = [paired_packs.add_teacher_inputs(item) for item in sample_documents(packs)]
    full_packs = collate([paired_packs[i] for i in range(min(MAX_SAMPLED, len(packs)))])
    student = build_check_inputs(
        packs,
        student=pair.student,
        student_tokenizer=pair.origin.tokenizer,
        teacher=None,
        teacher_tokenizer=None,
        vocabulary=vocabularies["student"],
        kind=kind,
        compute_dtype=module.compute_dtype,
    )
    teacher_batch = get_view(full_packs, "teacher")
    stop_sets = [find_stop_tokens(item.model, item.tokenizer) for item in (pair.origin, teacher)]
    labels = teacher_batch["labels"][teacher_batch["documents"] >= 0]
    return CrossTokenizerInputs(
        student=student,
        teacher=replace(
            student,
            student=teacher.model,
            student_tokenizer=teacher.tokenizer,
            vocabulary=vocabularies["teacher"],
            batch=move_batch(get_view(collate(documents), "teacher"), device),
            full_pack=move_batch(teacher_batch, device),
            stop_share=compute_shared_stop_share(full_packs, *stop_sets),
            trained_share=float((labels != IGNORE).float().mean()),
            role="teacher",
        ),
        readers=(paired_packs.student, paired_packs.teacher),
        module=module,
        documents=[move_batch(collate([item]), device) for item in documents],
        batch=move_batch(collate(documents), device),
        full_packs=full_packs,
        aligned_share=compute_aligned_share(paired_packs, max_packs=MAX_SAMPLED),
    )


def compute_shared_stop_share(batch: Batch, student_stops: frozenset[int], teacher_stops: frozenset[int]) -> float:
    """Of the documents whose last trained token is a stop token for the student, the share that is for the teacher."""
    model_batches = zip(
        (get_view(batch, name) for name in ("student", "teacher")), (student_stops, teacher_stops), strict=True
    )
    student_ends, teacher_ends = (
        [last in stops for last in _list_last_trained_tokens(model_batch)] for model_batch, stops in model_batches
    )
    matches = [teacher_end for student_end, teacher_end in zip(student_ends, teacher_ends, strict=True) if student_end]
    return sum(matches) / max(len(matches), 1)


def _list_last_trained_tokens(batch: Batch) -> list[int]:
    """The last trained token of each document."""
    labels, documents = batch["labels"][0], batch["documents"][0]
    return [
        _get_last_trained_token(document_labels.numpy())
        for document_labels in labels.split(torch.bincount(documents).tolist())
    ]


def sample_documents(packs: Packs) -> list[Pack]:
    """Some short documents of the packs; a longer one is cut to a stretch with trained tokens."""
    stretches = (_cut_document(*document) for index in range(len(packs)) for document in _split_documents(packs[index]))
    return list(islice(stretches, NUM_DOCUMENTS))


def _split_documents(pack: Pack) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and labels of each document of a pack."""
    return zip(*(pack[name].split(pack["lengths"].tolist()) for name in ("input_ids", "labels")), strict=True)


def _cut_document(ids: Tensor, labels: Tensor) -> Pack:
    """A document from the token before its first trained one, at most 48 tokens long."""
    start = int((labels != IGNORE).nonzero()[0]) - 1
    ids, labels = ids[start : start + MAX_DOCUMENT_TOKENS], labels[start : start + MAX_DOCUMENT_TOKENS].clone()
    labels[0] = IGNORE
    return {"input_ids": ids, "labels": labels, "lengths": torch.tensor([len(ids)])}


def compute_stop_share(packs: Packs, stops: frozenset[int]) -> float:
    """Of the documents that were not cut, the share whose last trained token is one of `stops`."""
    ends = packs.lengths.cumsum()
    has_stopped = [
        _get_last_trained_token(packs.labels[end - size : end]) in stops
        for end, size in zip(ends.tolist(), packs.lengths.tolist(), strict=True)
        if size < packs.length
    ]
    return sum(has_stopped) / max(len(has_stopped), 1)


def _get_last_trained_token(labels: Any) -> int:
    trained_labels = labels[labels != IGNORE]
    return int(trained_labels[-1]) if len(trained_labels) else IGNORE


def build_module(
    inputs: CheckInputs, *, student: Any = None, compute_dtype: torch.dtype = torch.float32
) -> TrainingModule:
    """Half cross-entropy, half the divergence, computed as in training: chunked, packed and cut to the shared ids."""
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
