"""One side in a process of its own, so that its peak memory is its own; the parent asks it for one answer at a time."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any


class Side:
    """A child that runs `sys.argv[0]` with `arguments` and answers each line of JSON with one."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.command = [sys.executable, sys.argv[0], *arguments]
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: Any) -> Any:
        """What the child answers; the process ends with it where it died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            sys.exit(f"{' '.join(self.command)} died with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(make: Callable[[], Callable[[Any], Any]], *, held: bool = False) -> None:
    """The child: `make` gives what answers, and it is asked until the parent has no more questions.

    What is `held` is memory that was freed, as a run of potstill holds it.
    """
    from potstill.core.memory import retain_freed_memory

    out, sys.stdout = sys.stdout, sys.stderr  # libraries print; the parent reads one line an answer
    with retain_freed_memory() if held else contextlib.nullcontext():
        answer = make()
        for line in sys.stdin:
            out.write(json.dumps(answer(json.loads(line))) + "\n")
            out.flush()


def alone(arguments: Sequence[str], question: Any = None) -> Any:
    """One answer of a child that ends with it."""
    side = Side(arguments)
    try:
        return side.ask(question)
    finally:
        side.close()
