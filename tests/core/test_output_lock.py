"""One process at a time writes an output, and a dead one is never in the way."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from potstill.core import output_lock as module
from potstill.core.errors import ArtifactError, OutputInUse
from potstill.core.output_lock import LockOwner, get_lock_file, output_lock

HOLD = """
import sys
from pathlib import Path
from potstill.core.output_lock import output_lock
with output_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def other_process(out: Path) -> Iterator[subprocess.Popen[str]]:
    """A real process that holds the lock of `out` until its input ends."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], env=env, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.communicate()


def refusal(out: Path) -> str:
    with pytest.raises(OutputInUse) as caught, output_lock(out):
        pass
    return str(caught.value)


def test_a_second_process_is_refused_by_the_name_of_the_first_and_a_killed_owner_blocks_nobody(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    link = tmp_path / "link"
    link.symlink_to(out)
    with other_process(out) as process:
        for path in (out, link):
            message = refusal(path)
            assert f"process {process.pid} on" in message
            assert str(out) in message
            assert "-c" in message
        (out / "inner").mkdir(parents=True)
        assert f"writing {out} " in refusal(out / "inner" / "deeper")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert get_lock_file(out).is_file()
    with output_lock(out):
        owner = LockOwner.from_file(get_lock_file(out))
        assert owner is not None
        assert owner.pid == os.getpid()
    assert not get_lock_file(out).exists()
    with other_process(out / "inner"):
        assert f"writing {out / 'inner'} " in refusal(out)


def test_an_end_removes_the_lock_and_the_folders_made_for_it_and_an_owner_may_lock_what_is_inside(
    tmp_path: Path,
) -> None:
    out = tmp_path / "new" / "out"
    with output_lock(out), output_lock(out / "1-prune"):
        assert "process" in refusal(out)  # another thread of this process is in the way too
    assert list(tmp_path.iterdir()) == []


def test_stale_locks_inside_go_and_files_of_others_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with output_lock(out / "a"):
        text = get_lock_file(out / "a").read_text()
    get_lock_file(out / "a").write_text(text)
    (out / ".poetry.lock").write_text("not ours")
    with output_lock(out):
        assert [file.name for file in out.iterdir()] == [".poetry.lock"]


@pytest.mark.parametrize("alive", [True, False])
def test_where_a_file_system_has_no_locks_the_owner_of_this_host_counts(
    alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(module.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", fail)
    process = multiprocessing.get_context("spawn").Process(target=signal.pause)
    process.start()
    try:
        if not alive:
            process.kill()
            process.join()
        owner = LockOwner.of_this_process().__dict__ | {"pid": process.pid}
        get_lock_file(tmp_path / "out").write_text(module.json.dumps(owner))
        if alive:
            assert f"process {process.pid}" in refusal(tmp_path / "out")
        else:
            with output_lock(tmp_path / "out"):
                pass
    finally:
        process.kill()
        process.join()


def test_a_system_without_locks_uses_that_an_open_file_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "fcntl", None)
    get_lock_file(tmp_path / "out").write_text("{}")
    with output_lock(tmp_path / "out"):
        assert LockOwner.from_file(get_lock_file(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []

    def keep(*_: object, **__: object) -> None:
        raise PermissionError

    with output_lock(tmp_path / "out"), monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", keep)
        assert "process" in refusal(tmp_path / "out")


def test_an_output_that_cannot_be_written_is_one_sentence() -> None:
    with pytest.raises(ArtifactError, match="writing /proc/made failed"), output_lock(Path("/proc/made")):
        pass
