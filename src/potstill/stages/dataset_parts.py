"""A data set that a model writes part by part, so that a stage that was stopped continues."""

import hashlib
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from potstill.core.atomic_files import CARD_FILE, TRAINING_FOLDER, atomic_folder, write_rows
from potstill.core.card import Card, read_card
from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.errors import DataError, OutputExists, UsageError
from potstill.models.load import LoadedModel
from potstill.stages.console import explain_write_errors, get_command
from potstill.stages.generate_options import DataOptions
from potstill.stages.option_checks import check_single_process
from potstill.stages.preflight import StageInputs
from potstill.stages.run_folder import explain_interrupt, reserve_output, training_folder
from potstill.stages.run_models import load_run_model
from potstill.stages.run_record import RunRecord
from potstill.stages.stage import make_parent, to_plain_dict
from potstill.stages.text_options import prepare_tokenizer

PROMPTS_PER_PART = 64  # finished parts stay when the stage is stopped
SPLITS = ("train", "validation")

T = TypeVar("T")


class GeneratedDataset(NamedTuple):
    """The rows of the data set that is written, and the facts for its card."""

    train: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    details: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DatasetJob:
    """What a stage has read before its model.

    `write` gets the model, whose part in the work is its `role`, and the folder of finished parts. `data` are facts for
    the card, with the `text_digest`. A resumed stage needs the same digest and the same `origins`.
    """

    write: Callable[[LoadedModel, Path], GeneratedDataset]
    role: str
    data: Mapping[str, Any]
    origins: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DatasetStage(DataOptions, ABC):
    """A stage in which `model` answers the first `documents` prompts of `data` (0: all), and a data set results.

    Each prompt has its own random numbers, so the result depends on the seed and not on the batch size.

    Raises: UsageError for an option out of its range.
    """

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, minimum in (("documents", 0), ("max_tokens", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")

    @abstractmethod
    def prepare(self) -> DatasetJob:
        """Read everything but the model. Raises: UsageError, NotFound, DataError."""

    @property
    def inputs(self) -> StageInputs:
        """What the stage reads."""
        return StageInputs(models=(self.model,), data=(self.data,))

    def to_dict(self) -> dict[str, Any]:
        """The stage and its options as plain data."""
        return to_plain_dict(self)

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
        """Writes the data set to `out`, which holds only `training/` until it is complete, and returns its card.

        Raises: UsageError, NotFound, DataError, OutputExists before anything is written; Interrupted with the finished
            parts left for `resume`.
        """
        check_single_process()
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
            return self._write(out, overwrite=not resume)

    def _read_finished_card(self, out: Path) -> dict[str, Any]:
        card = read_card(out)
        if card.get("stage") != self.to_dict():
            raise OutputExists(f"{out} holds another data set, which is complete; choose another --out")
        return card

    def _write(self, out: Path, *, overwrite: bool) -> dict[str, Any]:
        """Writes the data set, or with `overwrite` off what is missing of it.

        Parts without a result go, because a resumed stage would end like this one.
        """
        job = self.prepare()
        loaded, origins = load_answering_model(
            self, None if overwrite else RunRecord.from_folder(out / TRAINING_FOLDER)
        )
        origins |= {"text": job.data["text_digest"], **job.origins}
        record, start = RunRecord(options=self.to_dict(), origins=origins), time.perf_counter()
        with (
            explain_write_errors(out),
            explain_interrupt(out, saved="every finished part", is_resumable=has_finished_part),
            training_folder(out, record, overwrite=overwrite, is_resumable=has_finished_part) as folder,
        ):
            try:
                dataset = job.write(loaded, folder)
            except DataError:
                shutil.rmtree(folder)
                raise
            card = Card(
                stage=self.to_dict(),
                seed=self.seed,
                parents=[make_parent(job.role, loaded)],
                data=job.data,
                cost={"seconds": time.perf_counter() - start},
                details=dataset.details,
                command=get_command(),
            )
            with atomic_folder(out, overwrite=True) as staging_folder:
                for split in SPLITS:
                    if rows := getattr(dataset, split):
                        write_rows(staging_folder / f"{split}.jsonl", rows)
                card.write(staging_folder)
        return card.to_dict()


def load_answering_model(options: DataOptions, saved: RunRecord | None) -> tuple[LoadedModel, dict[str, Any]]:
    """The model on its device with its chat template, and the origins of its answers; `saved` is of a resumed run.

    Raises: UsageError, NotFound, ArtifactError, UnsupportedModel.
    """
    loaded = load_run_model(options, options.model)
    text_facts = prepare_tokenizer(loaded.tokenizer, options, origins=None if saved is None else saved.origins)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device_type=str(device))
    loaded.move_to(device, dtype)
    template = hashlib.sha256(str(loaded.tokenizer.chat_template).encode()).hexdigest()
    origins = {"model": loaded.digest, "dtype": str(dtype), "device": device.type, "template": template}
    return loaded, {**origins, **text_facts}


def has_finished_part(folder: Path) -> bool:
    """Whether a training folder holds a finished part."""
    return any(folder.glob("*-*.jsonl"))


def load_part(file: Path, write: Callable[[], Sequence[Any]]) -> list[Any]:
    """The lines of a part; if its file does not exist, `write` gives them and they are stored."""
    if not file.exists():
        write_rows(file, write())
    with file.open(encoding="utf-8") as lines:  # str.splitlines would also cut at the U+2028 of an answer
        return [json.loads(line) for line in lines]


def load_parts(
    folder: Path, name: str, items: Sequence[T], write: Callable[[Sequence[T], int], Sequence[Any]], *, size: int
) -> list[Any]:
    """The lines of parts of `size` items, in files called `name`; `write` gets a part and the number of its first."""
    return [
        line
        for number, part in enumerate(cut_parts(items, size))
        for line in load_part(folder / f"{name}-{number:05}.jsonl", partial(write, part, number * size))
    ]


def cut_parts(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items in parts of `size`; the last one may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]
