"""Folders that appear whole or not at all, and the card inside."""

import json
import os
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError

from potstill.core.atomic_files import (
    CARD_FILE,
    CARRY_FILE,
    atomic_folder,
    check_output_free,
    hash_file,
    is_partial,
    recover_folder,
    remove_inner_folder,
    remove_leftovers,
    replace_folder,
    write_text,
)
from potstill.core.card import Card, Parent, get_package_versions, read_card
from potstill.core.errors import ArtifactError, OutputExists
from potstill.core.measure import Measure


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def fail_in(folder: Path, error: BaseException) -> None:
    (folder / "half").write_text("1")
    raise error


def test_a_folder_appears_only_once_the_block_has_ended_well(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as folder:
        (folder / "a").write_text("1")
        assert (is_partial(folder), is_partial(out)) == (True, False)
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), atomic_folder(tmp_path / "out") as folder:  # noqa: PT012
        (folder / "a").write_text("1")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: disk full")])
def test_a_disk_that_fails_is_one_sentence_and_what_stood_there_stands(error: Exception, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "card.json").write_text("kept")
    with pytest.raises(ArtifactError, match=r"No space left|disk full"), atomic_folder(out, overwrite=True) as folder:
        fail_in(folder, error)
    assert names(tmp_path) == ["out"]
    assert (out / "card.json").read_text() == "kept"


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "card.json").write_text("gone")
    with pytest.raises(OutputExists, match="not empty"), atomic_folder(out):
        pass
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("here")
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_replacement_that_fails_brings_back_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("kept")
    with pytest.raises(OSError):
        replace_folder(tmp_path / "missing", out)
    assert (out / "old").read_text() == "kept"
    assert names(tmp_path) == ["out"]


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExists, match="did not make"):
        check_output_free(tmp_path, overwrite=True)
    (tmp_path / "1-prune").mkdir()
    (tmp_path / "1-prune" / "card.json").write_text("{}")
    check_output_free(tmp_path, overwrite=True)


def test_a_file_where_a_folder_belongs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExists, match="is a file"):
        check_output_free(tmp_path / "file")


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    check_output_free(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(ArtifactError, match="no permission"):
            check_output_free(tmp_path / "out")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_text_is_replaced_whole_and_leaves_no_other_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one")
    write_text(tmp_path / "a.txt", "zwölf\n")
    assert (tmp_path / "a.txt").read_bytes() == "zwölf\n".encode()
    assert names(tmp_path) == ["a.txt"]


def test_a_file_is_hashed_by_sha_256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert hash_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_card_comes_back_as_it_was_written(tmp_path: Path) -> None:
    measure = Measure(name="perplexity", value=12.5, unit="1", n=300, low=12.0, high=13.0)
    card = Card(
        stage={"name": "distill", "keep": 0.5},
        seed=3,
        parents=[Parent(role="teacher", name="a ✓", digest="00", licence="mit")],
        measures={"student": [measure]},
        command="potstill distill",
    )
    card.write(tmp_path)
    found = read_card(tmp_path)
    assert found == json.loads(json.dumps(card.to_dict()))
    assert found["measures"]["student"][0]["value"] == 12.5
    assert found["parents"][0]["licence"] == "mit"
    assert found["versions"].keys() == get_package_versions().keys() >= {"python", "torch", "transformers"}


@pytest.mark.parametrize("content", [None, "{", "\xff\xfe"])
def test_a_card_that_is_missing_or_broken_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / CARD_FILE).write_text(content, encoding="latin-1")
    with pytest.raises(ArtifactError, match=CARD_FILE):
        read_card(tmp_path)


def test_a_folder_that_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, content in ((".out.0123abcd.old", "before"), (".out.4567cdef.partial", "after")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(content)
    recover_folder(out)
    assert names(tmp_path) == ["out"]
    assert (out / "a").read_text() == "before"


def test_what_was_replaced_already_goes_and_other_names_stay(tmp_path: Path) -> None:
    for name in ("out", ".out.0123abcd.old", ".out.4567cdef.partial", ".outer.0123abcd.old", ".out.mine.old"):
        (tmp_path / name).mkdir()
    recover_folder(tmp_path / "out")
    assert names(tmp_path) == [".out.mine.old", ".outer.0123abcd.old", "out"]


def test_clearing_takes_half_written_files_and_folders_alone(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-3.partial").mkdir()
    (tmp_path / ".capture.json.0123abcd.partial").write_text("{")
    (tmp_path / ".capture.json").write_text("{}")
    (tmp_path / "checkpoint-3").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".capture.json", "checkpoint-3"]


def test_through_a_link_a_folder_appears_where_the_link_leads(tmp_path: Path) -> None:
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    with atomic_folder(tmp_path / "out") as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "a").write_text("1")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "out" / "a").read_text() == "1"
    assert names(tmp_path / "disk") == ["out"]


def test_a_folder_where_a_file_system_is_mounted_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"/proc is a mount point"):
        check_output_free(Path("/proc"))


def test_a_folder_inside_moves_over_to_what_replaces_it_also_after_a_kill_in_between(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "training").mkdir(parents=True)
    (out / "training" / "a").write_text("kept")
    with atomic_folder(out, overwrite=True, carry="training") as folder:
        (folder / "model").write_text("1")
    assert names(out) == ["model", "training"]
    backup = tmp_path / ".out.0123abcd.old"  # where a kill leaves it: the new folder is in place, the inner one is not
    backup.mkdir()
    (out / "training").rename(backup / "training")
    (out / CARRY_FILE).write_text("training")
    recover_folder(out)
    assert (names(out), names(tmp_path)) == (["model", "training"], ["out"])
    assert (out / "training" / "a").read_text() == "kept"
    remove_inner_folder(out / "training")
    assert (names(out), names(tmp_path)) == (["model"], ["out"])
