"""What a run was begun with: a file in its training folder, with which a resumed run is compared."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from potstill.core.atomic_files import RECORD_FILE, TRAINING_FOLDER, write_text
from potstill.core.errors import ArtifactError, UsageError
from potstill.stages.stage import reproducible_options
from potstill.train.run import compute_run_id

# Origins, which are digests, say whether what these options name is the same; a place may change.
PLACES = (
    *("teacher", "student", "model", "data", "eval_data", "exclude", "columns", "chat_template", "teacher_cache"),
    *("reference", "reference_cache", "plus", "minus", "dtype", "device"),
)
COMMAND_LINE_NAMES = {"learning_rate": "lr", "objective.name": "objective"}
MAX_SHOWN = 24  # characters of a value in a message; a digest is longer


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The options of a run's stage, and its `origins`: the digests of what it read, and what follows from the machine.

    A resumed run needs the same origins and the same options, except for those that change no result and those that
    name a place.
    """

    options: Mapping[str, Any]
    origins: Mapping[str, Any]

    @classmethod
    def from_folder(cls, folder: Path) -> "RunRecord | None":
        """The record in a training folder; None where there is none.

        Raises: ArtifactError for a damaged one.
        """
        file = folder / RECORD_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return cls(options=dict(content["options"]), origins=dict(content["origins"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{file} cannot be read ({error}), so the run cannot be resumed; choose another --out to begin anew"
            ) from error

    @property
    def run_id(self) -> str:
        """A digest of the record, which every checkpoint of the run holds."""
        return compute_run_id(self.options, self.origins)

    def write(self, folder: Path) -> None:
        """Write the record into a training folder."""
        write_text(folder / RECORD_FILE, json.dumps(asdict(self), indent=1, default=str))

    def check_same_origins(self, out: Path, saved: "RunRecord") -> None:
        """Refuse to continue the run in `out` with other models, text or dtype.

        Raises: UsageError that names what changed.
        """
        current: Mapping[str, Any] = json.loads(json.dumps(self.origins, default=str))
        changes = [
            describe_changed_origin(name, saved.origins.get(name), current.get(name))
            for name in sorted({*saved.origins, *current})
            if saved.origins.get(name) != current.get(name)
        ]
        refuse_changes(f"the run in {out}", changes)


def check_same_options(out: Path, options: Mapping[str, Any]) -> None:
    """Refuse to continue the run in `out` with other options than it was begun with; no models are needed.

    Raises: UsageError that names every changed option with both values; ArtifactError.
    """
    saved = RunRecord.from_folder(out / TRAINING_FOLDER)
    if saved is not None:
        refuse_changes(f"the run in {out}", find_changed_options(saved.options, options, skip=PLACES))


def refuse_changes(run: str, changes: Sequence[str]) -> None:
    """Refuse to continue `run` if there are changes.

    Raises: UsageError.
    """
    if changes:
        raise UsageError(
            f"{run} was begun with {' and '.join(changes)}; give what it was to continue it, or choose another --out "
            f"to begin anew"
        )


def find_changed_options(saved: Mapping[str, Any], current: Mapping[str, Any], *, skip: Sequence[str]) -> list[str]:
    """The options that differ and may change a result, each described with both values.

    An option that only one side has, since versions differ, counts as empty on the other.
    """
    before, now = (dict(flatten_options(reproducible_options(options))) for options in (saved, current))
    return [
        describe_change(COMMAND_LINE_NAMES.get(name, name.split(".")[-1]), before.get(name), now.get(name))
        for name in dict.fromkeys((*before, *now))
        if name not in skip and before.get(name) != now.get(name) and (before.get(name) or now.get(name))
    ]


def describe_change(name: str, before: Any, now: Any) -> str:
    """`lr 0.0005, and now it is 0.001`; `another text` or `other caches` where values are too long to read."""
    shown = [str(list(value) if isinstance(value, tuple) else value) for value in (before, now)]
    if max(map(len, shown)) > MAX_SHOWN:
        return f"other {name}" if name.endswith("s") else f"another {name}"
    return f"{name} {shown[0]}, and now it is {shown[1]}"


def describe_changed_origin(name: str, before: Any, now: Any) -> str:
    """`other models (teacher)` by the roles of those that differ; any other origin as `describe_change` has it."""
    if name != "models":
        return describe_change(name, before, now)
    pairs = itertools.zip_longest(before or (), now or ())
    roles = dict.fromkeys((current or previous)[0] for previous, current in pairs if previous != current)
    return f"other models ({', '.join(roles)})"


def flatten_options(options: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The options of a stage; those of `settings` and of the arms' common config by their own names."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            inner = "" if name in ("settings", "common") else f"{name}."
            yield from flatten_options(value, prefix=f"{prefix}{inner}")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value
