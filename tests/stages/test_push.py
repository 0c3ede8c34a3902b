"""An upload holds a finished model and no folder of the machine, and its rehearsal needs no network."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from tests.models.test_edits import make_edit
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.card import MISSING_MEASURES, Card, Parent
from potstill.core.errors import ArtifactError, ServerError, UnsupportedModel, UsageError
from potstill.models.edit_folder import EditFolder, save_edits
from potstill.models.saving import save_model_folder
from potstill.stages.model_card import write_card
from potstill.stages.push import push

CARD = Card(
    stage={"stage": "prune", "model": "/home/someone/big"},
    seed=1,
    parents=[Parent(role="pruned from", name="/home/someone/big", digest="0", licence="mit")],
    command="potstill prune /home/someone/big --out made",
)


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "made"
    save_model_folder(tiny_llama, tiny_tokenizer, folder)
    write_card(folder, CARD, title="made")
    (folder / "checkpoints").mkdir()
    return folder


def test_a_rehearsal_lists_the_files_and_asks_no_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the network was used"))
    result = push(folder, "you/student", dry_run=True)
    assert set(result["files"]) == {file.name for file in folder.iterdir() if file.is_file()}
    assert result["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert (result["bytes"], result["license"], result["url"]) == (sum(result["files"].values()), "mit", None)


def test_an_upload_is_one_commit_that_names_the_repository_and_no_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Hub:
        def create_repo(self, repo: str, **options: Any) -> None:
            calls.append((repo, options))

        def create_commit(self, repo: str, operations: list[Any], **_: Any) -> Any:
            calls.append((repo, {one.path_in_repo: one.path_or_fileobj for one in operations}))
            return SimpleNamespace(commit_url=f"https://hub/{repo}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert push(folder, "you/student", private=True)["url"] == "https://hub/you/student"
    assert calls[0] == ("you/student", {"private": True, "exist_ok": True})
    files = calls[1][1]
    assert b'from_pretrained("you/student"' in files["README.md"]
    assert json.loads(files["card.json"])["stage"]["model"] == "big"
    assert not any(b"someone" in files[name] for name in ("README.md", "card.json"))
    assert "/home/someone/big" in (folder / "card.json").read_text()


def test_a_folder_of_edits_is_refused_with_the_name_of_its_base(folder: Path, tmp_path: Path) -> None:
    (edited := tmp_path / "edited").mkdir()
    edits = EditFolder(base=str(folder), digest="0", edits=(make_edit("Rome"),), similarity=0.0)
    save_edits(edited, edits)
    with pytest.raises(UnsupportedModel, match=f"holds edits of facts of {folder}, and push uploads whole models"):
        push(edited, "you/edited", dry_run=True)


def test_a_hub_that_refuses_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub, "HfApi", refuse)
    with pytest.raises(ServerError, match=r"did not take you/student.*401 Unauthorized.*hf auth login"):
        push(folder, "you/student")


@pytest.mark.parametrize(
    ("break_folder", "reason"),
    [
        pytest.param(lambda folder: (folder / "training").mkdir(), "not finished.*--resume", id="a run"),
        pytest.param(lambda folder: (folder / "card.json").unlink(), r"no card\.json", id="no card"),
        pytest.param(lambda folder: (folder / "model.safetensors").unlink(), "no weights", id="no weights"),
        pytest.param(
            lambda folder: write_card(folder, replace(CARD, failures=MISSING_MEASURES), title="made"),
            "no finished model card",
            id="no measures",
        ),
    ],
)
def test_what_is_not_finished_is_refused(break_folder: Callable[[Path], object], reason: str, folder: Path) -> None:
    break_folder(folder)
    with pytest.raises(ArtifactError, match=reason):
        push(folder, "you/student", dry_run=True)


@pytest.mark.parametrize("repo", ["student", "a/b/c", "", "https://huggingface.co/you/student"])
def test_a_repository_has_an_owner_and_a_name(repo: str, folder: Path) -> None:
    with pytest.raises(UsageError, match="OWNER/NAME"):
        push(folder, repo, dry_run=True)
