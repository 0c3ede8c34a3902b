"""A job that trains a model, as a value: its options, and everything that `training` needs of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel

from potstill.core.atomic_files import write_text
from potstill.core.card import Parent
from potstill.core.device import SAVE_DTYPES, get_dtype_name
from potstill.core.measure import Measure
from potstill.data.packing import collate
from potstill.models.depth_loads import record_loads
from potstill.models.load import LoadedModel
from potstill.stages.preflight import StageInputs
from potstill.stages.run_record import RunRecord
from potstill.stages.saved_model import save_checked_model
from potstill.train.config import TrainConfig
from potstill.train.rollouts.steps import AnyRollout
from potstill.train.training_module import TrainingModule

LOAD_PACKS = 8  # on which loads are measured


@runtime_checkable
class TrainingConfig(Protocol):
    """The options of a job: how to train, what it reads, and all of it as plain data."""

    @property
    def settings(self) -> TrainConfig: ...
    @property
    def inputs(self) -> StageInputs: ...
    @property
    def trust_remote_code(self) -> bool: ...
    @property
    def save_dtype(self) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class TrainingRun(ABC):
    """A job with its models and data in memory; nothing is on disk yet.

    `student` is the model that `module` trains, which may carry adapters there; `origin` is the model that it came
    from. `data` and `details` describe the text and the student in the card. `run_facts` are what else a run has to
    agree on to be resumed; `text_facts` hold the date that the chat template writes. `files` are the texts of further
    files of the student's folder, by name.
    """

    config: TrainingConfig
    module: TrainingModule
    student: PreTrainedModel
    origin: LoadedModel
    packs: Any
    validation: Any
    dtype: torch.dtype
    parents: Sequence[Parent]
    data: Mapping[str, Any]
    data_digest: str
    details: Mapping[str, Any] = field(default_factory=dict)
    run_facts: Mapping[str, Any] = field(default_factory=dict)
    text_facts: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    rollout: AnyRollout | None = None

    @property
    def prefers_chosen(self) -> bool:
        """Whether a run on preferences makes chosen answers likelier than rejected ones."""
        return True

    @property
    def record(self) -> RunRecord:
        """What a resumed run has to agree on: the options, and what was read.

        Of the pruned student that is its shape, and not the measured harm, which has other digits on another machine.
        """
        origins = {
            "models": [[parent.role, parent.digest or parent.name] for parent in self.parents],
            "text": self.data_digest,
            "dtype": get_dtype_name(self.dtype),
            "student": {name: self.details[name] for name in ("shape", "kept_layers") if name in self.details},
            "caches": dict(self.run_facts),
            **self.text_facts,
        }
        return RunRecord(options=self.config.to_dict(), origins=origins)

    @property
    @abstractmethod
    def measuring_status(self) -> str:
        """The line that is shown while the models are measured."""

    @abstractmethod
    def connections(self) -> AbstractContextManager[None]:
        """A context that closes what the run holds open."""

    @abstractmethod
    def warn_if_insufficient(self, out: Path, *, show: bool) -> None:
        """Print what the run takes, and whether the machine has it. Raises: ArtifactError for a full disk."""

    @abstractmethod
    def measure_baseline(self) -> list[Measure]:
        """The quality of the student before training."""

    @abstractmethod
    def run_checks(self) -> list[dict[str, str]]:
        """The checks before training, as records for the card. Raises: CheckFailed."""

    def release_memory(self) -> None:
        """Give back memory that training does not need."""
        return

    @abstractmethod
    def measure(self, student: LoadedModel) -> Mapping[str, Sequence[Measure]]:
        """The measures of the trained student, and of what it is compared with, by model name."""

    @abstractmethod
    def write_samples(self, student: LoadedModel) -> str:
        """What the student, and what it is compared with, write after some prompts, as Markdown."""

    @abstractmethod
    def check_samples(self) -> None:
        """Prepare the prompts of the samples, as `write_samples` will. Raises: DataError."""

    def save(self, student: PreTrainedModel, folder: Path) -> dict[str, str]:
        """Write the student to `folder`; the record that says whether it reloads to the same logits.

        Held-out text, or else the training text, measures the loads of layers that tokens may skip.
        """
        packs = self.validation if len(self.validation) else self.packs
        record_loads(student, (collate([packs[i]]) for i in range(min(len(packs), LOAD_PACKS))))
        for name, text in self.files.items():
            write_text(folder / name, text)
        dtype, trust_remote_code = SAVE_DTYPES[self.config.save_dtype], self.config.trust_remote_code
        return save_checked_model(student, self.origin, folder, dtype=dtype, trust_remote_code=trust_remote_code)
