"""The weight files of a model on disk."""

from pathlib import Path

from potstill.core.errors import NotFound
from potstill.models.gguf_files import list_parts

# Only weights: optimizer states and training arguments also end in .bin, an objective's projectors in .safetensors.
WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin", "*.gguf")


def count_bytes_on_disk(path: Path) -> int:
    """Bytes of the weight files at `path`, a folder or a file; only the first format of `WEIGHT_FILES` counts.

    Raises: NotFound if there are none.
    """
    if path.is_file():
        return sum(file.stat().st_size for file in list_parts(path))
    for pattern in WEIGHT_FILES:
        if weight_files := sorted(path.glob(pattern)):
            return sum(file.stat().st_size for file in weight_files)
    raise NotFound(f"{path} has no weight files ({', '.join(WEIGHT_FILES)})")
