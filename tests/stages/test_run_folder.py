"""One training folder serves every stage."""

from pathlib import Path

import pytest

from potstill.core.errors import ArtifactError, Interrupted, OutputExists, UsageError
from potstill.stages.preflight import StageInputs
from potstill.stages.run_folder import explain_interrupt, reserve_output, training_folder
from potstill.stages.run_record import RunRecord, check_same_options, find_changed_options

FIRST = RunRecord(options={"stage": "distill"}, origins={"text": "a"})


def has_part(folder: Path) -> bool:
    return (folder / "part").exists()


def test_a_folder_with_nothing_to_resume_is_removed(tmp_path: Path) -> None:
    with training_folder(tmp_path, FIRST, is_resumable=has_part) as folder:
        assert RunRecord.from_folder(folder) == FIRST
    assert not folder.exists()


def test_a_resumable_folder_stays_with_its_first_record_until_it_is_overwritten(tmp_path: Path) -> None:
    other = RunRecord(options={"stage": "distill", "save_every": 3}, origins=FIRST.origins)
    for record, overwrite, expected in ((FIRST, False, FIRST), (other, False, FIRST), (other, True, other)):
        with training_folder(tmp_path, record, overwrite=overwrite, is_resumable=has_part) as folder:
            assert RunRecord.from_folder(folder) == expected
            assert has_part(folder) == (record is other and not overwrite)
            (folder / "part").touch()
            (folder / ".half.partial").touch()
    assert has_part(folder)


def test_other_origins_are_refused_by_name_and_a_run_without_a_record_is_not_continued(tmp_path: Path) -> None:
    begun = RunRecord(options={}, origins={"text": "a" * 64, "dtype": "float32", "models": [["student", "f" * 64]]})
    now = RunRecord(options={}, origins={"text": "b" * 64, "dtype": "bfloat16", "models": [("student", "f" * 64)]})
    with training_folder(tmp_path, begun, is_resumable=has_part) as folder:
        (folder / "part").touch()
    with (
        pytest.raises(UsageError, match="begun with dtype float32, and now it is bfloat16 and another text; give what"),
        training_folder(tmp_path, now, is_resumable=has_part),
    ):
        pass
    for change, words in (
        ({"models": [["student", "f" * 64], ["teacher", "a" * 64]]}, r"other models \(teacher\)"),
        ({"models": [["student", "e" * 64]]}, r"other models \(student\)"),
        ({"caches": {"one": "c" * 64}}, "other caches"),
    ):
        changed = RunRecord(options={}, origins={**begun.origins, **change})
        with (
            pytest.raises(UsageError, match=f"begun with {words}; give what"),
            training_folder(tmp_path, changed, is_resumable=has_part),
        ):
            pass
    (folder / "run.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"run\.json cannot be read"):
        check_same_options(tmp_path, {})
    (folder / "run.json").unlink()
    with pytest.raises(ArtifactError, match="does not say"), training_folder(tmp_path, now, is_resumable=has_part):
        pass
    assert has_part(folder)


def test_a_changed_option_is_named_with_both_values_and_what_changes_no_result_may_change() -> None:
    settings = {"learning_rate": 5e-4, "save_every": 0, "micro_tokens": 64, "report_to": [], "compile": False}
    saved = {"stage": "distill", "teacher": "here", "documents": 2, "settings": settings, "objective": {"name": "jsd"}}
    neutral = {**settings, "save_every": 5, "micro_tokens": 32, "report_to": ["wandb"], "compile": True}
    moved = {**saved, "teacher": "there", "device": "cpu", "settings": neutral}
    assert find_changed_options(saved, moved, skip=("teacher", "device")) == []
    changed = {**saved, "documents": 3, "settings": {**settings, "learning_rate": 0.1}, "objective": {"name": "kl"}}
    assert find_changed_options(saved, changed, skip=()) == [
        "documents 2, and now it is 3",
        "lr 0.0005, and now it is 0.1",
        "objective jsd, and now it is kl",
    ]
    assert find_changed_options(saved, {**saved, "new": False}, skip=()) == []  # of a newer version, at its default


def test_to_resume_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with reserve_output(tmp_path / "made", StageInputs(), resume=True):
        pass
    assert "nothing to resume" in capsys.readouterr().err
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "card.json").write_text("{}")
    with (
        pytest.raises(OutputExists, match=r"a finished run, so there is nothing to resume; choose another --out$"),
        reserve_output(tmp_path / "made", StageInputs(), resume=True),
    ):
        pass


@pytest.mark.parametrize("finished", [False, True])
def test_ctrl_c_is_explained_only_if_something_is_saved(finished: bool, tmp_path: Path) -> None:
    def interrupted_run() -> None:
        with (
            explain_interrupt(tmp_path, saved="every part", is_resumable=has_part),
            training_folder(tmp_path, FIRST, is_resumable=has_part) as folder,
        ):
            if finished:
                (folder / "part").touch()
            raise KeyboardInterrupt

    with pytest.raises(Interrupted if finished else KeyboardInterrupt) as caught:
        interrupted_run()
    assert not finished or str(caught.value).startswith("stopped; every part is saved in")


def test_a_run_is_resumed_with_files_at_another_place(tmp_path: Path) -> None:
    folder = tmp_path / "training"
    folder.mkdir()
    RunRecord(options={"data": "a.jsonl", "chat_template": "a.jinja", "seed": 1}, origins={}).write(folder)
    check_same_options(tmp_path, {"data": "b.jsonl", "chat_template": "b.jinja", "seed": 1})
    with pytest.raises(UsageError, match="seed 1, and now it is 2"):
        check_same_options(tmp_path, {"data": "a.jsonl", "chat_template": "a.jinja", "seed": 2})
