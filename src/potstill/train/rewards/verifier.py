"""math-verify in a process of its own with a time limit, so that no answer of a model can stop a run or go unnoticed.

Inside a process, math-verify limits its time with signals, which work in the main thread alone, and calls two answers
different wherever it fails. Here each comparison has a limit in any thread, and a failure is a verdict of its own.

Source: https://github.com/huggingface/Math-Verify.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from potstill.core.errors import RewardFailed

WORKER = Path(__file__).with_name("verifier_worker.py")
START_LIMIT = 60.0  # seconds until the first verdict, for imports on a busy machine
TIME_LIMIT = 5.0  # seconds for a comparison
MAX_CHARACTERS = 1000  # of an answer; a longer one is no answer
PROBES = (("1/2", "0.5", True), ("1/2", "1/3", False))  # reference, answer, and whether they are equal


class Verdict(NamedTuple):
    """Whether two answers are equal. `failure` says what went wrong, and is empty where nothing did."""

    equal: bool
    failure: str = ""


def is_installed() -> bool:
    """Whether math-verify is installed."""
    return find_spec("math_verify") is not None


class MathVerifier:
    """Compares answers as mathematics, in at most `time_limit` seconds each.

    `command` starts a process that answers as `verifier_worker.py` does. When a process starts, two known pairs must
    get their verdicts. So a verifier that swallows its errors, and calls everything different, is noticed.
    """

    def __init__(
        self, command: Sequence[str] = (sys.executable, str(WORKER)), *, time_limit: float = TIME_LIMIT
    ) -> None:
        self.command, self.time_limit = list(command), time_limit
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._finalizer: weakref.finalize[..., MathVerifier] | None = None

    def verify(self, reference: str, answer: str) -> Verdict:
        """The verdict on an answer; a side that is no mathematics, or too long, makes it different.

        Raises: RewardFailed if the verifier does not work at all.
        """
        if max(len(reference), len(answer)) > MAX_CHARACTERS:
            return Verdict(False)
        if self._process is None:
            self._start()
        return self._ask(reference, answer, self.time_limit)

    def close(self) -> None:
        """End the process."""
        if self._finalizer is not None:
            self._finalizer()
        self._process, self._buffer = None, b""

    def _start(self) -> None:
        """Start the process and check its verdicts.

        Raises: RewardFailed.
        """
        process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._process, self._buffer = process, b""
        self._finalizer = weakref.finalize(self, _stop, process)
        for reference, answer, is_equal in PROBES:
            verdict = self._ask(reference, answer, START_LIMIT)
            if verdict.failure or verdict.equal != is_equal:
                self.close()
                word = "equal" if verdict.equal else "different"
                reason = verdict.failure or f"calls {reference} and {answer} {word}"
                raise RewardFailed(f"math-verify does not work: it {reason}; reinstall it with 'potstill[align]'")

    def _ask(self, reference: str, answer: str, limit: float) -> Verdict:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([reference, answer]).encode() + b"\n")
            process.stdin.flush()
            reply = dict(json.loads(self._read_line(process, limit)))
            if "error" in reply:
                return Verdict(False, f"fails with {reply['error']}")
            return Verdict(bool(reply.get("equal")))
        except TimeoutError:
            self.close()
            return Verdict(False, f"takes more than {limit:g} seconds")
        except (OSError, ValueError, TypeError):  # the process ended, or wrote something else
            self.close()
            return Verdict(False, "stops without a verdict")

    def _read_line(self, process: "subprocess.Popen[bytes]", limit: float) -> bytes:
        """The next line of the process. Raises: TimeoutError; ValueError if it ended."""
        assert process.stdout is not None
        deadline = time.monotonic() + limit
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                raise ValueError("the process ended")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not written is lost with its reader
            if pipe is not None:
                pipe.close()
