"""Plan: what a distillation is going to take, before it starts, and what to change where it does not fit."""

from collections.abc import Iterator, Mapping
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
from potstill.pipeline.calibrate import Calibration, assume, fitted
from potstill.pipeline.changes import changes
from potstill.pipeline.crossing import FEW_ALIGNED
from potstill.pipeline.distill import Distill
from potstill.pipeline.forecast import Forecast, forecast, pruning_bytes, tokenizer_bytes, workload_of
from potstill.pipeline.pair import Pair
from potstill.pipeline.probe import pace
from potstill.pipeline.prune import Prune
from potstill.pipeline.rehearse import lasts, rehearse, saved_bytes
from potstill.pipeline.rollouts import UNCOUNTED
from potstill.pipeline.room import Room, room
from potstill.pipeline.stage import as_value, require_one_process
from potstill.pipeline.teachers import require_one
from potstill.pipeline.texts import Text, prepare
from potstill.pipeline.texture import Otherwise, ids_of, texture
from potstill.pipeline.workload import CACHE_ROW, Workload
from potstill.transforms.fit import resized

PATIENCE = 120.0  # seconds that measured steps may take, as far as can be told before


class Known(NamedTuple):
    """What a plan is made from: both models without weights, the text as packs, the machine.

    `apart` is how a teacher with another tokenizer reads the text, None where both read it alike.
    """

    teacher: Blueprint
    student: Blueprint
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    packs: Packs
    device: torch.device
    dtype: torch.dtype
    caches: Mapping[str, Cache]
    apart: Otherwise | None = None
    chats: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `distill` would take. Rates come from `calibration`, from a few measured steps, or (not `measure`) from
    layers, a softmax and an optimiser's step alone.
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
        notes += said_of(self.distill, known.apart)
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
                "objective": work.taught.weights,
                "share": student.total / teacher.total,
            },
            "alignment": None if known.apart is None else known.apart.to_dict(),
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
        device, caches = backend.device(stage.device), stage.caches()
        text = Text(data=stage.data, columns=stage.columns, context=stage.settings.context, seed=stage.settings.seed)
        kept = list(caches.values())
        prepared = prepare(text, origin.tokenizer, tokens=stage.settings.tokens, documents=1, caches=kept)
        dtype = stage.compute_dtype(None, caches)
        packs, chats = prepared.packs, prepared.facts["kind"] != "text"
        vocabulary, apart = ids_of(teacher, origin, packs, stage.objective, chats=chats)
        return Known(
            teacher.blueprint, student, origin.tokenizer, vocabulary, packs, device, dtype, caches, apart, chats
        )

    def workload(self, stage: Distill, known: Known) -> Workload:
        """The sizes of `stage`, this plan's own or one that is suggested."""
        dtype = known.dtype if stage.dtype == self.distill.dtype else backend.dtype(stage.dtype, on=str(known.device))
        text, context = texture(known.packs), stage.settings.context
        shorter = context < self.distill.settings.context
        apart, most = known.apart, (context + 1) / 2
        text = text._replace(seen=min(text.seen, most)) if shorter else text
        apart = apart._replace(seen=min(apart.seen, most * apart.tokens)) if shorter and apart else apart
        ids = known.vocabulary
        return workload_of(stage, known.teacher, known.student, vocabulary=ids, dtype=dtype, text=text, apart=apart)

    def forecast(self, stage: Distill, known: Known, rates: Calibration) -> Forecast:
        """What `stage` takes."""
        work = self.workload(stage, known)
        dtype = torch.bfloat16 if work.compute_bytes == 2 else torch.float32
        pruning = 0.0
        if stage.student is None:
            kept = saved_bytes(known.teacher, dtype=dtype, stock=False)
            pruning = pruning_bytes(known.teacher, known.student, kept)
        saved = saved_bytes(known.student, dtype=dtype, lora=stage.lora)
        running = pace(work, known.device)
        return forecast(work, saved, running, rates, tokenizer=tokenizer_bytes(known.tokenizer), pruning=pruning)

    def rates(self, known: Known) -> tuple[Calibration, list[str]]:
        """The calibration, and what has to be said of it."""
        if self.calibration is not None:
            return self.calibration, ["the rates are those of the calibration that was given; no step was run"]
        guess = assume(self.workload(self.distill, known), known.device)
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
            if lasts(made.step) <= PATIENCE and (free is None or made.phases["training"] - guess.beside <= free):
                said = f"steps of {chosen.batch_tokens} tokens were measured"
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


def said_of(stage: Distill, apart: Otherwise | None) -> Iterator[str]:
    """What has to be said of an objective that is not all counted, and of a teacher with another tokenizer."""
    if stage.objective.alive:
        yield (
            f"of {stage.objective.name} products with both heads, maps and weights are counted; the rest of its time "
            f"and memory is what measured steps show, and is left out where none was run"
        )
    if apart is not None and apart.aligned < FEW_ALIGNED:
        yield (
            f"{apart.aligned:.1%} of the trained tokens are aligned; at the others an objective at aligned tokens "
            f"learns nothing from the teacher"
        )


def cut(stage: Distill, teacher: Blueprint) -> Blueprint:
    """The shape that pruning would give; which layers stay is left open, since none is read."""
    prune = Prune(model=str(stage.teacher), keep=stage.keep, params=stage.params, strategy=stage.strategy)
    with torch.device("meta"):
        unfilled = Backbone(teacher)
    return resized(teacher, prune.target(unfilled))


def calibrated(stage: Distill, known: Known, work: Workload) -> Calibration:
    """The rates of a few steps of `stage`, run with the study that it would train."""
    pair = rehearsed_pair(stage, known)._replace(chats=known.chats)
    pair.student.to(known.device)
    teacher = pair.teacher
    assert isinstance(teacher, Loaded)  # `known` has refused the others
    teacher.model.to(known.device, known.dtype)
    study = stage.study(pair, known.dtype, known.caches)
    if known.caches:
        teacher.model.to("meta")
    live = teacher.model if work.source == "live" else None
    seen = rehearse(study, live, pair.packs(known.packs), stage.settings)
    held = sum(work.memory(saved_bytes(known.student, dtype=known.dtype, lora=stage.lora)).values())
    return fitted(seen, work, pace(work, known.device), held=held)


def rehearsed_pair(stage: Distill, known: Known) -> Pair:
    """The pair of `stage`; a student that would have to be pruned is one of its shape, with random weights."""
    if stage.student is not None:
        return stage.pair(known.dtype)
    teacher = load(str(stage.teacher), allow_pickle=stage.allow_pickle, trust_remote_code=stage.trust_remote_code)
    student = export_model(Backbone(known.student), teacher.model)
    return Pair(student, teacher, teacher, known.vocabulary, [], {})


def fits(made: Forecast, free: Room) -> dict[str, bool]:
    """Whether memory and disk are enough; memory that cannot be known is taken to be."""
    return {"memory": free.memory is None or made.peak <= free.memory, "disk": made.disk["most"] <= free.disk}


def cache_row(known: Known) -> float:
    """Bytes a row of the teacher's cache: of the one that is used, else what one of the top 64 takes."""
    cache = known.caches.get("teacher")
    return float(CACHE_ROW) if cache is None else cache.manifest.bytes / cache.manifest.rows
