"""Draft heads on disk: a folder with `draft.json`, the kind and the sizes, and `draft.safetensors`, the weights."""

import json
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from potstill.core.atomic_files import atomic_folder
from potstill.core.errors import ArtifactError, NotFound

CONFIG_FILE, WEIGHTS_FILE = "draft.json", "draft.safetensors"


Heads = TypeVar("Heads", bound="DraftHeads")


class DraftHeads(nn.Module):
    """What Medusa heads and feature-level drafts share: `sizes` to build them anew, and their folder."""

    kind: ClassVar[str]
    sizes: dict[str, Any]

    def save(self, out: Path, *, overwrite: bool = False) -> None:
        """Writes the heads; the folder appears complete or not at all.

        Raises: OutputExists if the folder is not empty.
        """
        with atomic_folder(out, overwrite=overwrite) as folder:
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Writes the two files into a folder that exists."""
        weights = {name: weight.contiguous() for name, weight in self.state_dict().items()}
        config = {"kind": self.kind, **self.sizes}
        save_file(weights, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls: type[Heads], folder: Path) -> Heads:
        """The heads in a folder.

        Raises: NotFound without the folder's files; ArtifactError for heads of another kind, or other weights.
        """
        heads = cls(**read_sizes(folder, cls.kind))
        try:
            heads.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ArtifactError(f"the weights in {folder} cannot be loaded ({error}); write the heads again") from error
        return heads


def read_sizes(folder: Path, kind: str) -> dict[str, Any]:
    """The sizes of the heads in a folder.

    Raises: NotFound without the folder's files; ArtifactError for heads of another kind.
    """
    try:
        sizes = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFound(f"{folder} has no {CONFIG_FILE}; give a folder of {kind} heads") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / CONFIG_FILE} is not valid JSON ({error}); write the heads again") from error
    if sizes.pop("kind", None) != kind:
        raise ArtifactError(f"{folder} holds no {kind} heads; give the folder of such heads")
    return dict(sizes)


def check_width(folder: Path, width: int, hidden: int) -> None:
    """Raises ArtifactError for heads of another target."""
    if width != hidden:
        raise ArtifactError(
            f"the heads in {folder} read states of width {width}, and the model has {hidden}; train them on this model"
        )
