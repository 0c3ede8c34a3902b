"""GGUF files in capitals, without a suffix, split or in a folder: opened, or named for what they are."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.models.folders import POINTER, compute_logits, write_gguf

from potstill.core.errors import ArtifactError, NotFound, PotstillError, UsageError
from potstill.models.gguf_files import merge_parts
from potstill.models.lineage import read_license
from potstill.models.load import compute_digest, load_model
from potstill.models.locate import locate_model
from potstill.models.spec import read_model_spec
from potstill.models.weight_files import count_bytes_on_disk


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A GGUF file, and the logits of the model that it was made of."""
    files, model = write_gguf(tmp_path_factory.mktemp("gguf"))
    return files[0], compute_logits(model)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same file in three parts."""
    return write_gguf(tmp_path_factory.mktemp("split"), parts=3)[0]


@pytest.mark.parametrize("name", ["model.gguf", "MODEL.Q8_0.GGUF", "sha256-0f1e", "model"])
def test_a_gguf_file_opens_under_any_name(name: str, whole: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    shutil.copy(whole[0], tmp_path / name)
    loaded = load_model(tmp_path / name)
    assert (compute_logits(loaded.model) - whole[1]).abs().max() < 0.02 * whole[1].abs().max()  # of 8-bit blocks
    assert loaded.license == "mit"
    assert loaded.path == tmp_path / name


def test_a_split_file_is_one_model_by_whichever_part(whole: tuple[Path, torch.Tensor], split: list[Path]) -> None:
    loaded, reference = load_model(split[1]), load_model(whole[0])
    assert torch.equal(compute_logits(loaded.model), compute_logits(reference.model))
    assert loaded.tokenizer("hé <|im_end|>").input_ids == reference.tokenizer("hé <|im_end|>").input_ids
    assert loaded.path == split[0]
    assert read_license(loaded.path) == "mit"
    assert read_model_spec(split[2]).blueprint == read_model_spec(whole[0]).blueprint
    assert count_bytes_on_disk(loaded.path) == sum(part.stat().st_size for part in split)


def test_the_digest_of_a_split_file_covers_every_part(split: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(split[0].parent, tmp_path / "copy")
    assert compute_digest(folder / split[0].name) == compute_digest(split[0])
    last = folder / split[2].name
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    assert compute_digest(folder / split[0].name) != compute_digest(split[0])


def test_merging_parts_leaves_no_file(split: list[Path]) -> None:
    with merge_parts(split[0]) as merged:
        assert merged.is_file()
        assert merged not in split
    assert not merged.exists()


def test_a_folder_of_one_gguf_model_is_that_model(whole: tuple[Path, torch.Tensor], split: list[Path]) -> None:
    assert locate_model(whole[0].parent) == whole[0]
    assert locate_model(split[0].parent) == split[0]


def add_another(folder: Path) -> None:
    shutil.copy(folder / "model.gguf", folder / "model.Q4_K_M.gguf")


def drop_second_part(folder: Path) -> None:
    shutil.move(folder / "model.gguf", folder / "model-00001-of-00002.gguf")


def leave_pointer(folder: Path) -> None:
    (folder / "model.gguf").write_bytes(POINTER)


def damage_part(folder: Path) -> None:
    shutil.copy(folder / "model.gguf", folder / "model-00001-of-00002.gguf")
    (folder / "model.gguf").rename(folder / "model-00002-of-00002.gguf")
    (folder / "model-00002-of-00002.gguf").write_bytes(b"GGUF no")


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (add_another, UsageError, r"holds 2 GGUF files \(model.Q4_K_M.gguf, model.gguf\); give the path of one"),
        (drop_second_part, ArtifactError, r"one of 2 parts, and model-00002-of-00002.gguf is not beside it"),
        (leave_pointer, ArtifactError, "Git LFS pointer.*run `git lfs pull` in"),
        (damage_part, ArtifactError, "llama-gguf-split --merge"),
    ],
)
def test_a_folder_of_gguf_files_that_is_no_model_is_refused_in_one_sentence(
    spoil: Callable[[Path], None],
    error: type[PotstillError],
    says: str,
    whole: tuple[Path, torch.Tensor],
    tmp_path: Path,
) -> None:
    shutil.copy(whole[0], tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=says) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_of_a_model_folder_names_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 2000)
    with pytest.raises(NotFound, match="give its folder"):
        locate_model(tmp_path / "model.safetensors")
