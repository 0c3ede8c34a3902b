"""Caches a teacher: computes its probabilities on a data set once, and stores them for any number of students.

    potstill cache --teacher TEACHER --data D --out cache
    potstill distill --teacher TEACHER --teacher-cache cache --student S --data D --out student

`teachers.cache_writer` writes the shards, `teachers.cached` describes the files and reads them.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from potstill.core import screen
from potstill.core.atomic_files import TRAINING_FOLDER, recover_folder
from potstill.core.card import Card, read_card
from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.errors import OutputExists, UsageError
from potstill.data.packing import Packs
from potstill.evaluate.scoring_windows import check_context
from potstill.models.causality import require_causal
from potstill.models.eval_mode import eval_mode
from potstill.models.load import LoadedModel, load_model
from potstill.stages import text_options
from potstill.stages.cache_packs import load_packs
from potstill.stages.console import explain_write_errors, get_command
from potstill.stages.option_checks import check_single_process
from potstill.stages.options import CacheTeacherOptions
from potstill.stages.preflight import StageInputs
from potstill.stages.run_folder import explain_interrupt, reserve_output, training_folder
from potstill.stages.run_record import RunRecord
from potstill.stages.stage import make_parent, to_plain_dict
from potstill.teachers import cache_folder
from potstill.teachers.cache_writer import CacheWriter
from potstill.teachers.cached import MANIFEST, VERSION, CacheFacts, Manifest
from potstill.teachers.log_prob_cache import LogProbWriter


@dataclass(frozen=True, kw_only=True)
class CacheTeacherConfig(CacheTeacherOptions):
    """Caches `teacher` on `data` in windows of `context` tokens: on all of it, or on the first `tokens`.

    Each row keeps its `top_k` likeliest tokens, or fewer if they hold the probability `mass`. It keeps the exact mass
    of all other tokens, divided into `classes` of similar tokens. `sampled` draws that many tokens instead; their
    frequencies give an unbiased gradient of the forward KL. `exact` stores float32 log-probabilities, and `hidden`
    adds the last hidden states. `own` stores instead log p(next token) of the answers of preferences, 4 bytes each.

    Source: random sampling, Anshumann et al. (arXiv:2503.16870). The classes are potstill's.

    Raises: UsageError for an option out of its range.
    """

    kind: ClassVar[str] = "capture"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, minimum in (("top_k", 1), ("classes", 1), ("sampled", 0), ("context", 2), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {minimum}")
        if self.classes > 255:
            raise UsageError(f"--classes is {self.classes}; it can be at most 255")
        if not 0 < self.mass <= 1:
            raise UsageError(f"--mass is {self.mass}; it must be a probability, above 0 and at most 1")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"--temperature is {self.temperature}; it must be positive")
        if self.own and (self.sampled or self.hidden or self.temperature != 1):
            raise UsageError(
                "--own stores one number a token, at temperature 1; omit --sampled, --hidden and --temperature"
            )
        if self.sampled and self.mass < 1:
            raise UsageError(
                "--mass limits the likeliest tokens, and --sampled stores none of them; give one of the two"
            )

    def to_dict(self) -> dict[str, Any]:
        """The stage and its options as plain data."""
        return to_plain_dict(self)

    @property
    def inputs(self) -> StageInputs:
        """What the stage reads."""
        return StageInputs(models=(self.teacher,), data=(self.data,))

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False, show: bool = True) -> Manifest:
        """Writes the cache to `out`, which holds only `training/` until the cache is complete.

        Raises: UsageError, NotFound, OutputExists before anything is written; Interrupted, ArtifactError with all
            finished shards left for --resume.
        """
        check_single_process()
        with reserve_output(
            out,
            self.inputs,
            overwrite=overwrite,
            resume=resume,
            options=self.to_dict(),
            resumable=(TRAINING_FOLDER, MANIFEST),
            recover=recover_cache,
        ):
            if resume and (out / MANIFEST).is_file() and not (out / TRAINING_FOLDER).is_dir():
                return self._read_finished_manifest(out)
            with screen.open_screen(show=show):
                return self._write(out, overwrite=overwrite or not resume)

    def _write(self, out: Path, *, overwrite: bool) -> Manifest:
        """Writes the cache, or with `overwrite` off what is missing of it."""
        teacher = load_model(self.teacher, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)
        check_context(self.context, teacher.model)
        saved = None if overwrite else RunRecord.from_folder(out / TRAINING_FOLDER)
        text_facts = text_options.prepare_tokenizer(
            teacher.tokenizer, self, origins=None if saved is None else saved.origins
        )
        packs, data_facts = load_packs(self, teacher.tokenizer)
        device = resolve_device(self.device)
        dtype = resolve_dtype(self.dtype, device_type=str(device))
        teacher.move_to(device, torch.float32 if self.own else dtype)  # a policy has float32 weights too
        require_causal(teacher.model, f"the teacher {teacher.name}")
        writer = self._build_writer(teacher, packs, dtype)
        facts = writer.compute_facts(data_facts["text_digest"] or packs.digest, context=self.context)
        facts = replace(facts, date=text_facts.get(text_options.DATE_ORIGIN, ""))
        origins = {"format": VERSION, **asdict(facts), "windows": packs.digest, "device": device.type}
        record = RunRecord(options=self.to_dict(), origins=origins)
        with (
            explain_write_errors(out),
            explain_interrupt(out, saved="every finished shard", is_resumable=cache_folder.has_finished_shard),
            training_folder(
                out,
                record,
                overwrite=overwrite,
                is_resumable=cache_folder.has_finished_shard,
            ) as folder,
        ):
            cache_folder.drop_damaged_shards(folder)
            start = time.perf_counter()
            with eval_mode(teacher.model), torch.no_grad(), screen.status("caching", total=len(packs)) as advance:
                writer.write(folder, on_progress=advance)
            return self._publish(out, folder, writer, {**data_facts, **text_facts}, facts, time.perf_counter() - start)

    def _build_writer(self, teacher: LoadedModel, packs: Packs, dtype: torch.dtype) -> CacheWriter | LogProbWriter:
        if self.own:
            return LogProbWriter(teacher=teacher, packs=packs, dtype=dtype, seed=self.seed)
        return CacheWriter(
            teacher=teacher,
            packs=packs,
            top_k=self.top_k,
            mass=self.mass,
            classes=self.classes,
            sampled=self.sampled,
            exact=self.exact,
            hidden=self.hidden,
            temperature=self.temperature,
            seed=self.seed,
        )

    def _read_finished_manifest(self, out: Path) -> Manifest:
        """The manifest of the complete cache in `out`, if this stage made it.

        Raises: OutputExists.
        """
        if read_card(out).get("stage") != self.to_dict():
            raise OutputExists(f"{out} holds another cache, which is complete; choose another --out")
        return Manifest.from_folder(out)

    def _publish(
        self,
        out: Path,
        folder: Path,
        writer: CacheWriter | LogProbWriter,
        data_facts: Mapping[str, Any],
        facts: CacheFacts,
        seconds: float,
    ) -> Manifest:
        """Adds card and manifest to the finished shards, and moves the folder to `out`."""
        names = {"teacher": writer.teacher.name, "text": data_facts["trained_on"], "columns": self.columns}
        manifest = writer.build_manifest(folder, facts, names)
        card = Card(
            stage=self.to_dict(),
            seed=self.seed,
            parents=[make_parent("teacher", writer.teacher)],
            data=data_facts,
            cost={"tokens": writer.packs.num_tokens, "seconds": seconds},
            details={
                "bytes_per_row": manifest.bytes / manifest.rows,
                "tokens_per_row": manifest.ids / manifest.rows,
            },
            command=get_command(),
        )
        card.write(folder)
        cache_folder.publish_cache(folder, out, manifest)
        return manifest


def recover_cache(out: Path) -> None:
    """Mends what a killed process left at `out`: a folder half replaced, or a complete cache not yet in its place."""
    recover_folder(out)
    cache_folder.finish_interrupted_move(out)
