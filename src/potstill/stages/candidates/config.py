"""Several samples for each prompt of a data set, and what is selected from them: a stage.

    potstill generate MODEL --data D --select prefer --samples 8 --temperature 0.9 --out pairs
    potstill align MODEL --objective dpo --data pairs --out model

`train.jsonl` holds the selected rows and `validation.jsonl` those of the held-out prompts.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from potstill.core.errors import UsageError
from potstill.core.options import build_options
from potstill.evaluate.consistency import KINDS
from potstill.models.load import LoadedModel
from potstill.stages.candidates import options as choices
from potstill.stages.candidates.options import CandidateOptions
from potstill.stages.candidates.questions import QuestionSet, load_excluded_keys, load_questions
from potstill.stages.candidates.sampler import CandidateSampler
from potstill.stages.candidates.select_mixed import select_mixed
from potstill.stages.candidates.select_preferences import select_preferences
from potstill.stages.candidates.solve import solve
from potstill.stages.console import print_note
from potstill.stages.dataset_parts import DatasetJob, DatasetStage, GeneratedDataset
from potstill.stages.generate_dataset import GenerateDatasetConfig
from potstill.stages.option_checks import check_choice
from potstill.stages.preflight import StageInputs
from potstill.teachers.served_judge import open_judge
from potstill.train.rewards.detectors import normalize_language
from potstill.train.rewards.registry import get_reward
from potstill.train.rewards.weighted import RewardSum

EXCLUDED_ORIGIN = "excluded prompts"  # in the record of a run, the digest of the keys of `exclude`


@dataclass(frozen=True, kw_only=True)
class CandidatesConfig(CandidateOptions, DatasetStage):
    """Samples of `model` for the prompts of `data`, and what `select` makes of them.

    Each prompt has its own random numbers, so the result depends on the seed and not on the batch size.

    Raises: UsageError for an option out of its range.
    """

    kind: ClassVar[str] = "candidates"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "exclude", tuple(map(str, self.exclude)))
        object.__setattr__(self, "pivot", normalize_language(self.pivot))
        check_choice("select", str(self.select), choices.SELECTIONS)
        check_choice("consistency", self.consistency, KINDS)
        check_choice("pivot-answer", self.pivot_answer, choices.PIVOT_ANSWERS)
        self._check_selection_options()
        if self.samples == 0:
            object.__setattr__(self, "samples", choices.ROUNDS[-1] if self.select == choices.SOLVE else choices.SAMPLES)
        if self.samples == 1 and self.select != choices.SOLVE:
            raise UsageError(f"--samples is 1; --select {self.select} compares samples, so draw 2 or more")
        if self.per_language < 0:
            raise UsageError(f"per_language is {self.per_language}; it must be at least 0")
        if self.samples < 1:
            raise UsageError(f"--samples is {self.samples}; it must be at least 1")
        if not self.temperature > 0:
            raise UsageError(
                f"--select draws several samples, which are all the same at --temperature {self.temperature:g}; give "
                f"one above 0, such as 0.9"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")

    def _check_selection_options(self) -> None:
        """Refuse options that `select` does not read. Raises: UsageError."""
        for name, selections in choices.SELECTIONS_BY_OPTION.items():
            if self.select not in selections and getattr(self, name) != getattr(CandidateOptions, name):
                raise UsageError(
                    f"--{name.replace('_', '-')} is for --select {' or '.join(selections)}; omit it with --select "
                    f"{self.select}"
                )

    @property
    def inputs(self) -> StageInputs:
        """What the stage reads."""
        return StageInputs(models=(self.model,), data=(self.data, *self.exclude))

    def build_reward(self) -> RewardSum:
        """The reward that says which samples are right. Raises: as `get_reward` does."""
        return get_reward(self.reward, open_judge=open_judge)

    def load_questions(self) -> QuestionSet:
        """The questions that are sampled for. Raises: as `questions.load_questions` does."""
        return load_questions(self)

    def prepare(self) -> DatasetJob:
        """The reward, the questions, and those that are left out.

        Raises: as `build_reward`, `load_questions` and `load_excluded_keys` do.
        """
        reward, data, excluded = self.build_reward(), self.load_questions(), load_excluded_keys(self)
        for note in reward.notes if self.select != choices.PREFER else ():
            print_note(note)
        return DatasetJob(
            write=partial(self._select, data, reward, excluded),
            role="model, which answered",
            data={"asked": data.name, "text_digest": data.digest},
            origins={**reward.digests, **({EXCLUDED_ORIGIN: hash_keys(excluded)} if excluded else {})},
        )

    def _select(
        self, data: QuestionSet, reward: RewardSum, excluded: Collection[str], loaded: LoadedModel, folder: Path
    ) -> GeneratedDataset:
        sampler = CandidateSampler(loaded, self, folder)
        if self.select == choices.PREFER:
            return select_preferences(self, sampler, data)
        if self.select == choices.MIXED:
            return select_mixed(self, sampler, data, reward, excluded)
        return solve(self, sampler, data, reward)


def build_dataset_stage(values: Mapping[str, Any]) -> CandidatesConfig | GenerateDatasetConfig:
    """The stage that answers a data set, or with `select` the one that samples and selects."""
    if values.get("select"):
        return build_options(CandidatesConfig, values)
    return build_options(GenerateDatasetConfig, values)


def hash_keys(keys: Collection[str]) -> str:
    """The SHA-256 of the keys of questions in any order."""
    return hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()
