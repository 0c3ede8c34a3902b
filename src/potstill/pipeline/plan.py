"""Plan: what a distillation is going to take, before it starts, and what to change where it does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from potstill.core import backend
from potstill.core.blueprint import Blueprint
from potstill.core.errors import UsageError
from potstill.data.cache import Cache
from potstill.data.pack import Packs
from potstill.data.wire import is_address
from potstill.evaluate.gap import advise
from potstill.evaluate.size import stored
from potstill.models.backbone import Backbone
from potstill.models.families.table import export_model
from potstill.models.load import Loaded, load
from potstill.models.outline import outline
from potstill.models.vocabulary import shared_ids
from potstill.pipeline.calibrate import Calibration, assume, fitted, product
from potstill.pipeline.distill import Distill
from potstill.pipeline.forecast import Forecast, forecast, pruning_bytes, tokenizer_bytes, workload_of
from potstill.pipeline.pair import Pair
from potstill.pipeline.prune import Prune
from potstill.pipeline.rehearse import MEASURED, WARM_UP, rehearse, saved_bytes
from potstill.pipeline.rollouts import UNCOUNTED
from potstill.pipeline.room import Room, room
from potstill.pipeline.stage import as_value, require_one_process
from potstill.pipeline.teachers import require_one
from potstill.pipeline.texts import Text, prepare
from potstill.pipeline.workload import CACHE_ROW, Workload, texture
from potstill.transforms.fit import resized

PATIENCE = 120.0  # seconds that measured steps may take, as far as can be told before
RANK = 16  # of the adapters that are suggested
SHORTEST = 128  # tokens of the shortest window that is suggested


class Known(NamedTuple):
    """What a plan is made from: both models without weights, the text as packs, the machine."""

    teacher: Blueprint
    student: Blueprint
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    packs: Packs
    device: torch.device
    dtype: torch.dtype
    cache: Cache | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `distill` would take. Rates come from `calibration`, from a few measured steps, or (not `measure`) from a
    product, a softmax and an optimiser's step alone.
    """

    distill: Distill
    measure: bool = True
    calibration: Calibration | None = None

    def run(self, out: Path = Path()) -> dict[str, Any]:
        """The plan as plain data; `out` is where the run would write. Nothing is left on disk.

        Raises: UsageError, NotFound, DataError, UnsupportedModel, as `Distill.run` does before it writes anything.
        """
        require_one_process()
        known = self.known()
        rates, notes = self.rates(known)
        notes += [UNCOUNTED] if self.distill.policy.writes else []
        made, free = self.forecast(self.distill, known, rates), room(out, known.device)
        teacher, student = stored(known.teacher), stored(known.student)
        work = self.workload(self.distill, known)
        flops = work.flops()
        return {
            "stage": as_value(self.distill),
            "parameters": {
                "teacher": {"blocks": teacher.blocks, "embeddings": teacher.embeddings, "total": teacher.total},
                "student": {"blocks": student.blocks, "embeddings": student.embeddings, "total": student.total},
                "trained": work.trained,
                "share": student.total / teacher.total,
            },
            "text": {**work.texture._asdict(), "tokens": known.packs.tokens, "cache_bytes_per_row": cache_row(known)},
            "flops_per_token": {**flops, "total": sum(flops.values())},
            **made.to_dict(),
            "step": {"passes": work.passes, "tokens_per_pass": work.tokens, "rows_per_pass": work.rows},
            "room": {"memory": free.memory, "disk": free.disk},
            "fits": fits(made, free),
            "suggestions": list(self.suggestions(known, rates, made, free)),
            "capacity_gap": advise(teacher=float(teacher.total), student=float(student.total)).to_dict(),
            "calibration": rates.to_dict(),
            "notes": notes,
        }

    def known(self) -> Known:
        """Everything that is read; no weight is."""
        stage = self.distill
        allowed = {"allow_pickle": stage.allow_pickle, "trust_remote_code": stage.trust_remote_code}
        name = require_one(stage.teacher, "a plan")
        if name is None or is_address(name):
            raise UsageError("a plan needs the teacher's config; give --teacher, a model that is here")
        teacher = outline(name, **allowed)
        origin = teacher if stage.student is None else outline(stage.student, **allowed)
        student = origin.blueprint if stage.student is not None else cut(stage, teacher.blueprint)
        for one in (teacher.blueprint, student):
            if stage.settings.context > one.context:
                raise UsageError(f"context is {stage.settings.context}, and a model here takes {one.context} tokens")
        device, cache = backend.device(stage.device), stage.cache()
        text = Text(data=stage.data, columns=stage.columns, context=stage.settings.context, seed=stage.settings.seed)
        prepared = prepare(
            text, origin.tokenizer, tokens=stage.settings.tokens, documents=1, caches=() if cache is None else (cache,)
        )
        vocabulary = shared_ids(teacher.tokenizer, origin.tokenizer)
        dtype = stage.compute_dtype(None)
        return Known(teacher.blueprint, student, origin.tokenizer, vocabulary, prepared.packs, device, dtype, cache)

    def workload(self, stage: Distill, known: Known) -> Workload:
        """The sizes of `stage`, this plan's own or one that is suggested."""
        dtype = known.dtype if stage.dtype == self.distill.dtype else backend.dtype(stage.dtype, on=str(known.device))
        text, context = texture(known.packs), stage.settings.context
        shorter = context < self.distill.settings.context
        text = text._replace(seen=min(text.seen, (context + 1) / 2)) if shorter else text
        return workload_of(stage, known.teacher, known.student, vocabulary=known.vocabulary, dtype=dtype, text=text)

    def forecast(self, stage: Distill, known: Known, rates: Calibration) -> Forecast:
        """What `stage` takes."""
        work = self.workload(stage, known)
        dtype = torch.bfloat16 if work.compute_bytes == 2 else torch.float32
        pruning = 0.0
        if stage.student is None:
            kept = saved_bytes(known.teacher, dtype=dtype, stock=False)
            pruning = pruning_bytes(known.teacher, known.student, kept)
        saved = saved_bytes(known.student, dtype=dtype, lora=stage.lora)
        return forecast(work, saved, rates, tokenizer=tokenizer_bytes(known.tokenizer), pruning=pruning)

    def rates(self, known: Known) -> tuple[Calibration, list[str]]:
        """The calibration, and what has to be said of it."""
        if self.calibration is not None:
            return self.calibration, ["the rates are those of the calibration that was given; no step was run"]
        guess = assume(self.workload(self.distill, known), known.device, known.dtype)
        if not self.measure:
            return guess, ["no step was run: times may be wrong by a factor of two, memory by a quarter"]
        stage, notes = self.affordable(known, guess)
        if stage is None:
            return guess, notes
        return calibrated(stage, known, self.workload(stage, known)), notes

    def affordable(self, known: Known, guess: Calibration) -> tuple[Distill | None, list[str]]:
        """The stage itself if a few of its steps can be run here, a smaller one if not, or none; and what to say."""
        settings = self.distill.settings
        small = replace(settings, batch_tokens=2 * settings.context, micro_tokens=settings.context)
        free = room(Path(), known.device).memory
        for chosen in (settings, small):
            stage = replace(self.distill, settings=chosen)
            made = self.forecast(stage, known, guess)
            time = (WARM_UP + MEASURED) * made.step
            if time <= PATIENCE and (free is None or made.phases["training"] - guess.beside <= free):
                said = f"{MEASURED} steps of {chosen.batch_tokens} tokens were measured"
                return stage, [said if chosen is settings else f"{said}: those of the run itself would take too much"]
        return None, [
            "no step was run, since even the smallest takes too much here: times may be wrong by a factor of two"
        ]

    def suggestions(self, known: Known, rates: Calibration, made: Forecast, free: Room) -> Iterator[dict[str, Any]]:
        """What lowers the memory or the disk that are needed, the one that helps memory most first."""
        found: list[dict[str, Any]] = []
        for change, stage in changes(self.distill):
            other = self.forecast(stage, known, rates)
            captured = stage.teacher_cache is not None and self.distill.teacher_cache is None
            disk = other.disk["most"] + (self.workload(stage, known).cache() if captured else 0.0)
            if other.peak < made.peak or (other.peak == made.peak and disk < made.disk["most"]):
                seconds = other.step * other.steps
                found.append({"change": change, "memory": other.peak, "disk": disk, "seconds": seconds})
        for one in sorted(found, key=lambda one: (one["memory"], one["disk"])):
            enough = (free.memory is None or one["memory"] <= free.memory) and one["disk"] <= free.disk
            yield {**one, "fits": enough}


def cut(stage: Distill, teacher: Blueprint) -> Blueprint:
    """The shape that pruning would give; which layers stay is left open, since none is read."""
    prune = Prune(model=str(stage.teacher), keep=stage.keep, params=stage.params, strategy=stage.strategy)
    with torch.device("meta"):
        unfilled = Backbone(teacher)
    return resized(teacher, prune.target(unfilled))


def calibrated(stage: Distill, known: Known, work: Workload) -> Calibration:
    """The rates of a few steps of `stage`, run with the study that it would train."""
    pair = rehearsed_pair(stage, known)
    pair.student.to(known.device)
    teacher = pair.teacher
    assert isinstance(teacher, Loaded)  # `known` has refused the others
    teacher.model.to("meta" if known.cache else known.device, known.dtype)
    study = stage.study(pair, known.dtype, {} if known.cache is None else {"teacher": known.cache})
    live = teacher.model if work.source == "live" else None
    seen = rehearse(study, live, known.packs, stage.settings)
    held = sum(work.memory(saved_bytes(known.student, dtype=known.dtype, lora=stage.lora)).values())
    return fitted(seen, work, held=held, gemm=product(known.device, known.dtype, inner=known.student.hidden))


def rehearsed_pair(stage: Distill, known: Known) -> Pair:
    """The pair of `stage`; a student that would have to be pruned is one of its shape, with random weights."""
    if stage.student is not None:
        return stage.pair(known.dtype)
    teacher = load(str(stage.teacher), allow_pickle=stage.allow_pickle, trust_remote_code=stage.trust_remote_code)
    student = export_model(Backbone(known.student), teacher.model)
    return Pair(student, teacher, teacher, known.vocabulary, [], {})


def changes(stage: Distill) -> Iterator[tuple[str, Distill]]:
    """Other ways to run `stage`, each by one option; at the end all that need least, together."""
    settings = stage.settings
    context, pass_tokens = settings.context, settings.packs_per_pass() * settings.context
    smallest = replace(stage, settings=replace(settings, micro_tokens=context))
    for tokens in sorted({pass_tokens // 2 // context * context, context}):
        if context <= tokens < pass_tokens:
            yield f"--micro-tokens {tokens}", replace(stage, settings=replace(settings, micro_tokens=tokens))
    for shorter in sorted({context // 2, SHORTEST}):
        if SHORTEST <= shorter < context:
            brief = replace(settings, context=shorter, micro_tokens=shorter)
            yield f"--context {shorter} --micro-tokens {shorter}", replace(stage, settings=brief)
    if not settings.checkpoint_activations:
        smallest = replace(smallest, settings=replace(smallest.settings, checkpoint_activations=True))
        yield "--checkpoint-activations", replace(stage, settings=replace(settings, checkpoint_activations=True))
    if not stage.lora:
        yield f"--lora {RANK}", replace(stage, lora=RANK)
        smallest = replace(smallest, lora=RANK)
    if stage.teacher_cache is None and stage.objective.teaches:
        yield "--teacher-cache CACHE, made before by potstill cache", replace(stage, teacher_cache="CACHE")
        smallest = replace(smallest, teacher_cache="CACHE")
    if settings.save_every and settings.save_every < settings.steps:
        yield f"--save-every {settings.steps}", replace(stage, settings=replace(settings, save_every=settings.steps))
    if smallest != stage:
        yield described(stage, smallest), smallest


def described(stage: Distill, other: Distill) -> str:
    """The options by which `other` differs, all together."""
    said = [f"--micro-tokens {other.settings.micro_tokens}"]
    twice = other.settings.checkpoint_activations and not stage.settings.checkpoint_activations
    said += ["--checkpoint-activations"] if twice else []
    said += [f"--lora {other.lora}"] if other.lora != stage.lora else []
    said += ["--teacher-cache CACHE"] if other.teacher_cache != stage.teacher_cache else []
    return " ".join(said)


def fits(made: Forecast, free: Room) -> dict[str, bool]:
    """Whether memory and disk are enough; memory that cannot be known is taken to be."""
    return {"memory": free.memory is None or made.peak <= free.memory, "disk": made.disk["most"] <= free.disk}


def cache_row(known: Known) -> float:
    """Bytes a row of the teacher's cache: of the one that is used, else what one of the top 64 takes."""
    return float(CACHE_ROW) if known.cache is None else known.cache.manifest.bytes / known.cache.manifest.rows
