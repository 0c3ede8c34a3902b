"""A folder of edits opens on its base as it was saved, and on no other weights."""

import json
from pathlib import Path

import pytest
import torch
from tests.models.test_edits import make_edit
from tests.stages.world import saved, teacher
from tests.tiny import random_llama
from transformers import PreTrainedTokenizerFast

from potstill.core.errors import ArtifactError, NotFound, PotstillError, UnsupportedModel, UsageError
from potstill.models.edit_folder import EditFolder, copy_base, is_edit_folder, load_edits, save_edits
from potstill.models.edits import get_edits
from potstill.models.load import compute_digest, load_model
from potstill.models.locate import locate_model
from potstill.models.quantization import check_trainable
from potstill.models.spec import read_model_spec
from potstill.stages.export.shared import check_plain_weights

__all__ = ["teacher"]


@pytest.fixture
def edited(teacher: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "edited"
    folder.mkdir()
    edits = (make_edit("Rome", prompts=("Where is Rome?",)), make_edit("Oslo", "奥斯陆"))
    save_edits(folder, EditFolder(base=str(teacher), digest=compute_digest(teacher), edits=edits, similarity=0.25))
    return folder


def test_edits_are_loaded_as_they_were_saved(edited: Path, teacher: Path) -> None:
    loaded, base = load_model(edited), load_model(teacher)
    edits = get_edits(loaded.model)
    assert edits is not None
    assert edits.similarity == 0.25
    assert [edit.triggers for edit in edits.edits] == [("Rome",), ("Oslo", "奥斯陆")]
    for layer, (neurons, values) in make_edit().deltas.items():
        assert torch.equal(edits.edits[1].deltas[layer].neurons, neurons)
        assert torch.equal(edits.edits[1].deltas[layer].values, values)
    assert loaded.note == f"2 edited facts on {teacher}"
    assert loaded.digest != base.digest
    assert get_edits(base.model) is None
    for name, weight in base.model.state_dict().items():
        assert torch.equal(weight, loaded.model.state_dict()[name])
    assert read_model_spec(edited).blueprint == read_model_spec(teacher).blueprint
    assert len({file.stat().st_mode for file in edited.iterdir()}) == 1  # whoever reads one file reads all


def test_a_copied_base_moves_with_the_folder(edited: Path, teacher: Path, tmp_path: Path) -> None:
    folder = load_edits(edited)
    name = copy_base(locate_model(str(teacher)), edited)
    save_edits(edited, EditFolder(base=name, digest=folder.digest, edits=folder.edits, similarity=0.0))
    teacher.rename(tmp_path / "gone")
    edited.rename(tmp_path / "moved")
    assert get_edits(load_model(tmp_path / "moved").model) is not None


def test_edits_of_other_weights_are_refused(
    edited: Path, teacher: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    saved(teacher, random_llama(tiny_tokenizer, tied=False), tiny_tokenizer)
    with pytest.raises(ArtifactError, match="were made on other weights"):
        load_model(edited)


def test_a_base_that_is_gone_is_named(edited: Path, teacher: Path, tmp_path: Path) -> None:
    teacher.rename(tmp_path / "gone")
    with pytest.raises(NotFound, match=r"holds edits, and their base .* cannot be opened .*set base in edits.json"):
        load_model(edited)
    with pytest.raises(NotFound, match="holds edits"):
        read_model_spec(edited)


def test_new_weights_would_lose_the_edits(edited: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"holds edits of facts.*name its base"):
        check_trainable(str(edited))
    with pytest.raises(UnsupportedModel, match="holds edits of facts"):
        check_plain_weights(str(edited), allow_pickle=False, trust_remote_code=False)
    with pytest.raises(UsageError, match="omit the size"):
        load_model(f"{edited}#0.5")


def test_a_damaged_folder_is_refused_in_one_sentence(edited: Path) -> None:
    facts = json.loads((edited / "edits.json").read_text())
    weights = (edited / "edits.safetensors").read_bytes()
    for changed, message in (
        ({"base": ""}, "names no base model"),
        ({"format": 9}, "has the format 9"),
        ({"edits": facts["edits"][:1]}, "are damaged"),
        ({"edits": [{"triggers": ["Rome"]}]}, "are damaged"),
    ):
        (edited / "edits.json").write_text(json.dumps({**facts, **changed}))
        with pytest.raises(PotstillError, match=message):
            load_model(edited)
    (edited / "edits.json").write_text(json.dumps(facts))
    for content in (weights[:-40], b"", None):
        (edited / "edits.safetensors").unlink(missing_ok=True)
        if content is not None:
            (edited / "edits.safetensors").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"damaged|has no edits.safetensors"):
            load_model(edited)


def test_a_whole_model_is_no_folder_of_edits(edited: Path, teacher: Path) -> None:
    assert is_edit_folder(edited)
    assert not is_edit_folder(teacher)
