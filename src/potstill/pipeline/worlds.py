"""What is examined, made from packs that are about to be trained on: a pair with one tokenizer, or with two."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.types import IGNORE, Batch, view
from potstill.data.cache import Cache
from potstill.data.pack import Pack, Packs, collate
from potstill.data.pairs import aligned_share
from potstill.models.load import Loaded
from potstill.objectives.distill import Distill
from potstill.pipeline.crossing import MOST, Crossing
from potstill.pipeline.examination import FORWARD_KL, World
from potstill.pipeline.pair import Pair
from potstill.train.study import Study

DOCUMENTS, LENGTH = 3, 48  # of the small batch: enough for packing to show, and a second on a laptop


def world_of(
    packs: Packs,
    *,
    student: PreTrainedModel,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    kind: str,
    compute: torch.dtype,
    cache: Cache | None = None,
    compared: Distill = FORWARD_KL,
) -> World:
    """What is examined, from packs that are about to be trained on."""
    return World(
        student=student,
        student_tokenizer=student_tokenizer,
        teacher=teacher,
        teacher_tokenizer=teacher_tokenizer,
        vocabulary=vocabulary,
        batch=_on(collate(few(packs)), student.device),
        whole=_on(collate([packs[0]]), student.device),
        kind=kind,
        stops=stopped(packs, stop_ids(student_tokenizer, student)),
        trained=packs.trained / (packs.tokens - len(packs.lengths)),
        compute=compute,
        cache=cache,
        compared=compared,
    )


def crossing_of(pair: Pair, packs: Packs, study: Study, *, kind: str) -> Crossing:
    """What is examined of a pair with two tokenizers, from the packs and the study that are about to be trained."""
    teacher, paired, ids, device = pair.teacher, pair.packs(packs), study.vocabulary, pair.student.device
    assert isinstance(teacher, Loaded)
    assert isinstance(ids, Mapping)
    documents = [paired.beside(one) for one in few(packs)]
    whole = collate([paired[i] for i in range(min(MOST, len(packs)))])
    student = world_of(
        packs,
        student=pair.student,
        student_tokenizer=pair.origin.tokenizer,
        teacher=None,
        teacher_tokenizer=None,
        vocabulary=ids["student"],
        kind=kind,
        compute=study.compute_dtype,
    )
    read, stops = view(whole, "teacher"), [stop_ids(one.tokenizer, one.model) for one in (pair.origin, teacher)]
    labels = read["labels"][read["documents"] >= 0]
    return Crossing(
        student=student,
        teacher=replace(
            student,
            student=teacher.model,
            student_tokenizer=teacher.tokenizer,
            vocabulary=ids["teacher"],
            batch=_on(view(collate(documents), "teacher"), device),
            whole=_on(read, device),
            stops=ending(whole, *stops),
            trained=float((labels != IGNORE).float().mean()),
            role="teacher",
        ),
        readers=(paired.student, paired.teacher),
        study=study,
        documents=[_on(collate([one]), device) for one in documents],
        batch=_on(collate(documents), device),
        whole=whole,
        share=aligned_share(paired, most=MOST),
    )


def ending(batch: Batch, ours: set[int], theirs: set[int]) -> float:
    """The share of the documents that end in a trained stop token for the student which do for the teacher too."""
    sides = zip((view(batch, name) for name in ("student", "teacher")), (ours, theirs), strict=True)
    ends, others = ([last in stops for last in _lasts(side)] for side, stops in sides)
    both = [other for end, other in zip(ends, others, strict=True) if end]
    return sum(both) / max(len(both), 1)


def _lasts(batch: Batch) -> list[int]:
    """The last trained token of each document."""
    labels, documents = batch["labels"][0], batch["documents"][0]
    return [_last(one.numpy()) for one in labels.split(torch.bincount(documents).tolist())]


def few(packs: Packs) -> list[Pack]:
    """Some short documents of the packs; of a longer one, a stretch that holds tokens to train on."""
    stretches = (_stretch(*document) for i in range(len(packs)) for document in _documents(packs[i]))
    return list(islice(stretches, DOCUMENTS))


def _documents(one: Pack) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and labels of each document of a pack."""
    return zip(*(one[name].split(one["lengths"].tolist()) for name in ("input_ids", "labels")), strict=True)


def _stretch(ids: Tensor, labels: Tensor) -> Pack:
    """A document from before its first trained token on."""
    start = int((labels != IGNORE).nonzero()[0]) - 1
    ids, labels = ids[start : start + LENGTH], labels[start : start + LENGTH].clone()
    labels[0] = IGNORE
    return {"input_ids": ids, "labels": labels, "lengths": torch.tensor([len(ids)])}


def stop_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> set[int]:
    """The ids with which an answer may end: end of text, those of the model's generation, and other special tokens."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    several = ends if isinstance(ends, list) else [ends]
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    return {i for i in (*several, *special, *tokenizer.all_special_ids) if i is not None}


def stopped(packs: Packs, stops: set[int]) -> float:
    """The share of documents, of those that were not cut, whose last trained token is one of `stops`."""
    ends = packs.lengths.cumsum()
    found = [
        _last(packs.labels[end - size : end]) in stops
        for end, size in zip(ends.tolist(), packs.lengths.tolist(), strict=True)
        if size < packs.length
    ]
    return sum(found) / max(len(found), 1)


def _last(labels: Any) -> int:
    trained = labels[labels != IGNORE]
    return int(trained[-1]) if len(trained) else IGNORE


def _on(batch: Batch, device: torch.device) -> Batch:
    return {name: values.to(device) for name, values in batch.items()}
