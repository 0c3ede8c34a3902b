"""Checkpoints are whole or absent."""

import json
from pathlib import Path

import pytest

from potstill.core.errors import ArtifactError
from potstill.train.checkpoint import MANIFEST, find_fault, find_latest_checkpoint, get_checkpoint_name, seal_checkpoint


def sealed(run: Path, step: int, *, study: str = "mine", keep: int = 2) -> Path:
    staged = run / "aside" / get_checkpoint_name(step)
    (staged / "deep").mkdir(parents=True)
    (staged / "weights.bin").write_bytes(bytes([step]) * 100)
    (staged / "deep" / "state.json").write_text(json.dumps({"step": step}))
    return seal_checkpoint(staged, run, run_id=study, keep=keep)


def test_a_sealed_checkpoint_verifies_and_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        assert find_fault(sealed(tmp_path, step), run_id="mine") is None
    assert sorted(f.name for f in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-11"]
    assert find_latest_checkpoint(tmp_path, run_id="mine") == tmp_path / "checkpoint-11"


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert find_latest_checkpoint(tmp_path, run_id="mine") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "deep", "manifest", "no manifest", "list"])
def test_any_damage_is_seen_and_the_one_before_is_taken(damage: str, tmp_path: Path) -> None:
    older, newer = (sealed(tmp_path, step) for step in (3, 4))
    weights = newer / "weights.bin"
    match damage:
        case "flip":
            weights.write_bytes(b"\x05" + weights.read_bytes()[1:])
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "remove":
            weights.unlink()
        case "deep":
            (newer / "deep" / "state.json").write_text("{}")
        case "manifest":
            (newer / MANIFEST).write_text('{"study": "mine", "fil')
        case "no manifest":
            (newer / MANIFEST).unlink()
        case "list":
            (newer / MANIFEST).write_text("[]")
    assert find_fault(newer, run_id="mine") is not None
    assert find_latest_checkpoint(tmp_path, run_id="mine") == older


def test_nothing_whole_or_nothing_of_this_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = sealed(tmp_path, 3)
    with pytest.raises(ArtifactError, match=r"checkpoint-3 belongs to a run with other settings.*--overwrite"):
        find_latest_checkpoint(tmp_path, run_id="another")
    (folder / "weights.bin").unlink()
    with pytest.raises(ArtifactError, match=r"checkpoint-3/weights.bin is missing or altered"):
        find_latest_checkpoint(tmp_path, run_id="mine")


def test_a_checkpoint_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    first = sealed(tmp_path, 3)
    (first / "weights.bin").write_bytes(b"old")
    sealed(tmp_path, 3)
    assert find_fault(first, run_id="mine") is None
    assert [f.name for f in tmp_path.iterdir() if f.name != "aside"] == ["checkpoint-3"]
