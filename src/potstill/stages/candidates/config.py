"""Several samples for each prompt of a data set, and what is selected from them: a stage.

    potstill generate MODEL --data D --select prefer --samples 8 --temperature 0.9 --out pairs
    potstill align MODEL --objective dpo --data pairs --out model

`train.jsonl` holds the selected rows and `validation.jsonl` those of the held-out prompts.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from potstill.core.atomic_files import CARD_FILE, TRAINING_FOLDER, atomic_folder, write_text
from potstill.core.card import Card, read_card
from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.errors import DataError, OutputExists, UsageError
from potstill.evaluate.consistency import KINDS
from potstill.models.load import LoadedModel, load_model
from potstill.stages.candidates import options as choices
from potstill.stages.candidates.options import CandidateOptions
from potstill.stages.candidates.questions import QuestionSet, load_questions
from potstill.stages.candidates.sampler import PART_PATTERN, CandidateSampler
from potstill.stages.candidates.select_mixed import select_mixed
from potstill.stages.candidates.select_preferences import select_preferences
from potstill.stages.candidates.selection import Selection
from potstill.stages.candidates.solve import solve
from potstill.stages.console import explain_write_errors, get_command, print_note
from potstill.stages.option_checks import check_choice, check_single_process
from potstill.stages.preflight import StageInputs
from potstill.stages.run_folder import explain_interrupt, reserve_output, training_folder
from potstill.stages.run_record import RunRecord
from potstill.stages.stage import make_parent, to_plain_dict
from potstill.stages.text_options import prepare_tokenizer
from potstill.teachers.served_judge import open_judge
from potstill.train.rewards.registry import get_reward
from potstill.train.rewards.weighted import RewardSum

SPLITS = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class CandidatesConfig(CandidateOptions):
    """Samples of `model` for the prompts of `data`, and what `select` makes of them.

    Each prompt has its own random numbers, so the result depends on the seed and not on the batch size.

    Raises: UsageError for an option out of its range.
    """

    kind: ClassVar[str] = "candidates"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("select", str(self.select), choices.SELECTIONS)
        check_choice("consistency", self.consistency, KINDS)
        check_choice("pivot-answer", self.pivot_answer, choices.PIVOT_ANSWERS)
        if self.samples == 0:
            object.__setattr__(self, "samples", choices.ROUNDS[-1] if self.select == choices.SOLVE else choices.SAMPLES)
        if self.samples == 1 and self.select != choices.SOLVE:
            raise UsageError(f"--samples is 1; --select {self.select} compares samples, so draw 2 or more")
        for name, minimum in (("documents", 0), ("max_tokens", 1), ("batch", 1), ("seed", 0), ("per_language", 0)):
            if getattr(self, name) < minimum:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        if self.samples < 1:
            raise UsageError(f"--samples is {self.samples}; it must be at least 1")
        if not self.temperature > 0:
            raise UsageError(
                f"--select draws several samples, which are all the same at --temperature {self.temperature:g}; give "
                f"one above 0, such as 0.9"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")

    def to_dict(self) -> dict[str, Any]:
        """The stage and its options as plain data."""
        return to_plain_dict(self)

    @property
    def inputs(self) -> StageInputs:
        """What the stage reads."""
        return StageInputs(models=(self.model,), data=(self.data, self.exclude))

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
        """Writes the data set to `out`, which holds only `training/` until it is complete, and returns its card.

        Raises: UsageError, NotFound, DataError, OutputExists before anything is written; Interrupted with the finished
            parts left for `resume`.
        """
        check_single_process()
        reward = self.build_reward()
        with reserve_output(
            out,
            self.inputs,
            overwrite=overwrite,
            resume=resume,
            options=self.to_dict(),
            resumable=(TRAINING_FOLDER, CARD_FILE),
        ):
            if resume and (out / CARD_FILE).is_file() and not (out / TRAINING_FOLDER).is_dir():
                return self._read_finished_card(out)
            return self._write(out, reward, overwrite=not resume)

    def build_reward(self) -> RewardSum:
        """The reward that says which samples are right. Raises: as `get_reward` does."""
        return get_reward(self.reward, open_judge=open_judge)

    def load_questions(self) -> QuestionSet:
        """The questions that are sampled for. Raises: as `questions.load_questions` does."""
        return load_questions(self)

    def _write(self, out: Path, reward: RewardSum, *, overwrite: bool) -> dict[str, Any]:
        """Writes the data set, or with `overwrite` off what is missing of it."""
        data = self.load_questions()
        loaded = load_model(self.model, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)
        saved = None if overwrite else RunRecord.from_folder(out / TRAINING_FOLDER)
        text_facts = prepare_tokenizer(loaded.tokenizer, self, origins=None if saved is None else saved.origins)
        device = resolve_device(self.device)
        dtype = resolve_dtype(self.dtype, device_type=str(device))
        loaded.move_to(device, dtype)
        origins = {"model": loaded.digest, "text": data.digest, "dtype": str(dtype), "device": device.type}
        record = RunRecord(options=self.to_dict(), origins={**origins, **reward.digests, **text_facts})
        start = time.perf_counter()
        for note in reward.notes if self.select != choices.PREFER else ():
            print_note(note)
        with (
            explain_write_errors(out),
            explain_interrupt(out, saved="every finished part", is_resumable=has_finished_part),
            training_folder(out, record, overwrite=overwrite, is_resumable=has_finished_part) as folder,
        ):
            selection = self._select(CandidateSampler(loaded, self, folder), data, reward, folder)
            return self._publish(out, loaded, data, selection, time.perf_counter() - start)

    def _select(self, sampler: CandidateSampler, data: QuestionSet, reward: RewardSum, folder: Path) -> Selection:
        """The selection. Where there is none, its samples go, because a resumed stage would end like this one.

        They stay where a reward fails: a judge may answer the next time.
        """
        try:
            if self.select == choices.PREFER:
                return select_preferences(self, sampler, data)
            return (select_mixed if self.select == choices.MIXED else solve)(self, sampler, data, reward)
        except DataError:
            shutil.rmtree(folder)
            raise

    def _publish(
        self, out: Path, loaded: LoadedModel, data: QuestionSet, selection: Selection, seconds: float
    ) -> dict[str, Any]:
        with atomic_folder(out, overwrite=True) as staging_folder:
            for split, rows in zip(SPLITS, (selection.train, selection.validation), strict=True):
                if rows:
                    write_rows(staging_folder / f"{split}.jsonl", rows)
            card = Card(
                stage=self.to_dict(),
                seed=self.seed,
                parents=[make_parent("model, which answered", loaded)],
                data={"asked": data.name, "text_digest": data.digest},
                cost={"seconds": seconds},
                details=selection.details,
                command=get_command(),
            )
            card.write(staging_folder)
        return card.to_dict()

    def _read_finished_card(self, out: Path) -> dict[str, Any]:
        card = read_card(out)
        if card.get("stage") != self.to_dict():
            raise OutputExists(f"{out} holds another selection, which is complete; choose another --out")
        return card


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def has_finished_part(folder: Path) -> bool:
    """Whether a training folder holds a finished part."""
    return any(folder.glob(PART_PATTERN))
