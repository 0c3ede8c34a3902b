"""What a stage checks before it opens a model: the packages and files that it needs, and its output folder."""

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from potstill.core.atomic_files import find_existing_folder
from potstill.core.errors import ArtifactError, DataError, MissingDependency, NotFound
from potstill.core.in_memory import resolve_path
from potstill.data import docstrings, hub
from potstill.data.files import get_format
from potstill.data.mixture import parse_sources
from potstill.models.locate import HUB_ID, PACKAGED_MODEL, get_packaged_path, locate_model, split_size
from potstill.models.weight_files import count_bytes_on_disk
from potstill.teachers.http_client import is_address

GIB = 2**30
EXTRAS = {  # the extra of potstill that installs a package
    "lm_eval": "eval",
    **dict.fromkeys(("fastapi", "uvicorn", "prometheus_client"), "serve"),
    **dict.fromkeys(("tensorboard", "wandb", "trackio"), "trackers"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx"),
    "openvino": "openvino",
    **dict.fromkeys(("math_verify", "py3langid", "langdetect"), "align"),
}


@dataclass(frozen=True, kw_only=True)
class StageInputs:
    """What a stage needs: models, data sets and other folders by name, and packages that may be missing.

    None is a name that was not given. `folders` need not exist. The stage writes at least `share` of the weights of
    `origin`, one of the models.
    """

    models: tuple[str | None, ...] = ()
    data: tuple[str | tuple[str, ...] | None, ...] = ()
    folders: tuple[str | None, ...] = ()
    packages: tuple[str, ...] = ()
    origin: str | None = None
    share: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that the stage reads."""
        return tuple(name for name in (*self.models, *self.data_names, *self.folders) if name)

    @property
    def data_names(self) -> tuple[str, ...]:
        """Every data set by its name, without weights. Raises: UsageError for weights that do not fit together."""
        return tuple(source.name for data in self.data if data for source in parse_sources(data))

    def check(self) -> None:
        """Refuse a package that is missing, and a model or data set that does not exist or cannot be read.

        A hub id is checked later, by the download.

        Raises: MissingDependency, NotFound, ArtifactError, DataError.
        """
        for package in self.packages:
            check_package(package)
        for name in filter(None, self.models):
            check_model_name(name)
        for name in self.data_names:
            check_data_name(name)

    def check_room(self, out: Path) -> None:
        """Refuse a disk that has no room for the weights that the stage writes at least.

        Raises: ArtifactError.
        """
        path = resolve_path(split_size(self.origin).model) if self.origin else None
        if path is None or not path.exists():
            return
        try:
            needed_bytes = self.share * count_bytes_on_disk(path)
        except NotFound:  # the loader says what is wrong with the folder
            return
        free_bytes = shutil.disk_usage(find_existing_folder(out)).free
        if needed_bytes > free_bytes:
            raise ArtifactError(
                f"the model takes {needed_bytes / GIB:.2f} GiB of disk or more, and {out} has {free_bytes / GIB:.2f} "
                f"GiB; make room, or choose another --out"
            )


def check_package(name: str) -> None:
    """Refuse a package that is not installed.

    Raises: MissingDependency.
    """
    if find_spec(name) is None:
        source = f"'potstill[{EXTRAS[name]}]'" if name in EXTRAS else name
        raise MissingDependency(f"{name} is not installed; run: pip install {source}")


def check_model_name(name: str) -> None:
    """Refuse a model that is not here and is no hub id, or that cannot be read; a server is taken as it is.

    Raises: NotFound, ArtifactError, MissingDependency.
    """
    name = split_size(name).model
    path = resolve_path(name)
    if name == PACKAGED_MODEL:
        get_packaged_path()
    elif not is_address(name) and (is_there(path) or not HUB_ID.fullmatch(name)):
        check_readable(locate_model(name), ArtifactError)


def check_data_name(name: str) -> None:
    """Refuse a data set that is not here and is no hub id, or that cannot be read.

    Raises: NotFound, DataError.
    """
    path = resolve_path(name)
    if is_there(path):
        check_readable(path, DataError)
    elif name not in docstrings.CORPORA and (not hub.DATASET_ID.fullmatch(name) or get_format(path)):
        raise NotFound(f"there is no file or folder {name}; a data set of the hub is called owner/name")


def check_readable(path: Path, error: type[ArtifactError | DataError]) -> None:
    """Refuse a file or a folder, or a file directly inside it, without permission to read.

    Raises: `error`.
    """
    entries = (path, *path.iterdir()) if path.is_dir() and os.access(path, os.R_OK | os.X_OK) else (path,)
    for entry in entries:
        if not os.access(entry, os.R_OK):
            raise error(f"{entry} cannot be read: permission denied; change its permissions")


def is_there(path: Path) -> bool:
    """Whether a path exists; False for a name that can be no path."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
