"""`potstill cache` as a shell calls it."""

import json
from pathlib import Path

from tests.cli.conftest import Call


def test_a_cache_is_made_listed_verified_and_removed(potstill: Call, teacher: Path, text: Path, tmp_path: Path) -> None:
    made = tmp_path / "cached"
    call = ("cache", "--teacher", teacher, "--data", text, "--context", 64, "--top-k", 8, "--dtype", "float32")
    assert potstill(*call, "--out", made).code == 0
    listed = potstill("cache", "ls", tmp_path)
    assert (listed.code, listed.err) == (0, "")
    (one,) = json.loads(potstill("cache", "ls", tmp_path, "--json").out)
    assert (one["out"], one["top_k"], one["facts"]["dtype"]) == (str(made), 8, "float32")
    assert json.loads(potstill("cache", "verify", made, "--json").out) == {"out": str(made), "whole": True}
    removed = potstill("cache", "rm", made)
    assert removed.code == 0
    assert "deleted " in removed.out + removed.err
    assert not made.exists()
    assert json.loads(potstill("cache", "ls", tmp_path, "--json").out) == []


def test_a_cache_of_which_a_byte_was_changed_is_not_whole(
    potstill: Call, teacher: Path, text: Path, tmp_path: Path
) -> None:
    made = tmp_path / "cached"
    potstill("cache", "--teacher", teacher, "--data", text, "--context", 64, "--dtype", "float32", "--out", made)
    shard = next(made.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    answer = potstill("cache", "verify", made)
    assert (answer.code, answer.out) == (1, "")
    assert f"{shard.name}" in answer.err
    assert "write it again" in answer.err


def test_a_cache_of_another_version_is_passed_over_refused_and_removed(
    potstill: Call, teacher: Path, text: Path, tmp_path: Path
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for made in (old, new):
        potstill("cache", "--teacher", teacher, "--data", text, "--context", 64, "--dtype", "float32", "--out", made)
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps({**manifest, "version": manifest["version"] - 1}))
    listed = potstill("cache", "ls", tmp_path, "--json")
    assert [one["out"] for one in json.loads(listed.out)] == [str(new)]
    for said in (listed, potstill("cache", "verify", old)):
        assert f"is a cache of version {manifest['version'] - 1}" in said.err
    assert potstill("cache", "rm", old).code == 0
    assert not old.exists()


def test_what_is_no_cache_is_not_removed(potstill: Call, text: Path) -> None:
    answer = potstill("cache", "rm", text.parent)
    assert answer.code == 2
    assert "is not a teacher cache" in answer.err
    assert text.exists()
