"""Keeps a second process away from an output: a file beside it, which the owner holds by a lock of the system.

The lock of `out` is `.NAME.lock` in the same folder. The system frees it when its process ends, however it ends, so a
file that a killed process left blocks nobody. On NFS the server keeps the lock, and frees it some time after a host
died (90 seconds by default). Where a file system has no locks, the file says who began, and the lock holds between
processes of one host.
"""

import contextlib
import errno
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from potstill.core.errors import ArtifactError, OutputInUse

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

LOCKLESS_ERRORS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # of a file system without locks
ATTEMPTS, ATTEMPT_SECONDS = 15, 0.02  # another process holds a lock for a moment when it looks or ends

_own_outputs: set[Path] = set()  # the outputs whose locks this process holds


@dataclass(frozen=True)
class LockOwner:
    """The process that writes an output: its id, its host, when it began to write, and its command."""

    pid: int
    host: str
    start: str
    command: str

    @classmethod
    def from_file(cls, file: Path) -> "LockOwner | None":
        """The owner that a lock file names; None for another file, or for one that is not written yet."""
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    @classmethod
    def of_this_process(cls) -> "LockOwner":
        """This process."""
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        return cls(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"), command)

    def is_alive_here(self) -> bool:
        """Whether another process of this host has the owner's id; False for an owner on another host."""
        if self.host != socket.gethostname() or self.pid == os.getpid() or os.name != "posix":
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


@contextlib.contextmanager
def output_lock(out: Path) -> Iterator[None]:
    """Holds the lock of `out`, a file or a folder, for the block; folders above it are made for the lock.

    A process may lock what lies inside its own output. The lock of another process on a folder above `out`, or on
    something directly inside it, is in the way too.

    Raises: OutputInUse with the owner, before anything else is touched; ArtifactError where `out` cannot be written.
    """
    out = out.expanduser().resolve()
    file = get_lock_file(out)
    new_folders = [folder for folder in out.parents if not folder.exists()]
    try:
        try:
            _check_neighbors(out)
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = _acquire(file, out)
        except OSError as error:
            raise ArtifactError(
                f"writing {out} failed: {error.strerror or error}; free some space there, or choose another --out"
            ) from error
        _own_outputs.add(out)
        try:
            yield
        finally:
            _own_outputs.discard(out)
            _release(handle, file)
    finally:
        for folder in new_folders:
            with contextlib.suppress(OSError):
                folder.rmdir()  # fails for a folder that is not empty


def get_lock_file(out: Path) -> Path:
    """The lock file of an output."""
    return out.with_name(f".{out.name}.lock")


def _check_neighbors(out: Path) -> None:
    """Refuse where another process writes a folder above `out`, or something inside it; stale locks inside go."""
    for folder in (folder for folder in out.parents if folder.name and folder not in _own_outputs):
        if (file := get_lock_file(folder)).is_file() and _is_held(file):
            raise _refusal(folder, file)
    for file in out.glob(".*.lock") if out.is_dir() else ():
        inner = out / file.name[1 : -len(".lock")]
        if inner in _own_outputs or LockOwner.from_file(file) is None:
            continue
        if _is_held(file):
            raise _refusal(inner, file)
        file.unlink(missing_ok=True)


def _acquire(file: Path, out: Path) -> int:
    """The handle of the lock file, which now names this process. Raises: OutputInUse, OSError."""
    for _ in range(ATTEMPTS):
        handle = _try_to_acquire(file)
        if handle is not None:
            break
        time.sleep(ATTEMPT_SECONDS)
    else:
        raise _refusal(out, file)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(asdict(LockOwner.of_this_process())).encode())
    except OSError:
        file.unlink(missing_ok=True)
        os.close(handle)
        raise
    return handle


def _try_to_acquire(file: Path) -> int | None:
    """The handle of the lock file once this process holds its lock; None while another one does."""
    if fcntl is None:
        return _try_to_replace(file)
    owner = LockOwner.from_file(file)
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_current = os.path.samestat(os.fstat(handle), file.stat())
    except (BlockingIOError, FileNotFoundError):  # held, or removed by the owner that just ended
        is_current = False
    except OSError as error:
        if error.errno not in LOCKLESS_ERRORS:
            os.close(handle)
            raise
        is_current = owner is None or not owner.is_alive_here()
    if is_current:
        return handle
    os.close(handle)
    return None


def _try_to_replace(file: Path) -> int | None:
    """`_try_to_acquire` for Windows, where a file that a process holds open cannot be removed."""
    try:
        file.unlink(missing_ok=True)
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except (PermissionError, FileExistsError):
        return None


def _release(handle: int, file: Path) -> None:
    """Remove the lock file while its lock is held, so that no other process takes a lock that is about to go."""
    if fcntl is None:
        os.close(handle)  # Windows removes no open file
    with contextlib.suppress(OSError):
        file.unlink()
    if fcntl is not None:
        os.close(handle)


def _is_held(file: Path) -> bool:
    """Whether another process holds this lock."""
    if fcntl is None:
        with contextlib.suppress(FileNotFoundError):
            try:
                file.unlink()
            except PermissionError:
                return True
        return False
    try:
        handle = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        owner = LockOwner.from_file(file)
        return owner is not None and owner.is_alive_here()
    finally:
        os.close(handle)


def _refusal(out: Path, file: Path) -> OutputInUse:
    """The error that names the process which writes `out`."""
    owner = LockOwner.from_file(file)
    if owner is None:
        return OutputInUse(f"another process writes {out}; wait for its end, or choose another --out")
    return OutputInUse(
        f"process {owner.pid} on {owner.host} has been writing {out} since {owner.start} ({owner.command}); wait for "
        f"its end, or choose another --out"
    )
