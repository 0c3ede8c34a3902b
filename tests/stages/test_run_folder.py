"""One training folder serves every stage."""

from pathlib import Path

import pytest

from potstill.core.errors import Interrupted
from potstill.stages.run_folder import explain_interrupt, training_folder


def has_part(folder: Path) -> bool:
    return (folder / "part").exists()


def test_a_folder_with_nothing_to_resume_is_removed(tmp_path: Path) -> None:
    with training_folder(tmp_path, overwrite=False, marker=("id", "a"), is_resumable=has_part) as folder:
        assert (folder / "id").read_text() == "a"
    assert not folder.exists()


def test_a_resumable_folder_stays_with_its_first_marker_until_it_is_overwritten(tmp_path: Path) -> None:
    for identity, overwrite, expected in (("a", False, "a"), ("b", False, "a"), ("c", True, "c")):
        with training_folder(tmp_path, overwrite=overwrite, marker=("id", identity), is_resumable=has_part) as folder:
            assert (folder / "id").read_text() == expected
            assert has_part(folder) == (identity == "b")
            (folder / "part").touch()
            (folder / ".half.partial").touch()
    assert has_part(folder)


@pytest.mark.parametrize("finished", [False, True])
def test_ctrl_c_is_explained_only_if_something_is_saved(finished: bool, tmp_path: Path) -> None:
    def interrupted_run() -> None:
        with (
            explain_interrupt(tmp_path, saved="every part", is_resumable=has_part),
            training_folder(tmp_path, overwrite=False, marker=("id", "a"), is_resumable=has_part) as folder,
        ):
            if finished:
                (folder / "part").touch()
            raise KeyboardInterrupt

    with pytest.raises(Interrupted if finished else KeyboardInterrupt) as caught:
        interrupted_run()
    assert not finished or str(caught.value).startswith("stopped; every part is saved in")
