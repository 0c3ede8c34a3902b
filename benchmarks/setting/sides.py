"""A compared program in its own process, so that its peak memory is its own; the parent asks one question at a time."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any


class Side:
    """A child process that runs `sys.argv[0]` with `arguments` and answers each line of JSON with one."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.command = [sys.executable, sys.argv[0], *arguments]
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: Any) -> Any:
        """The child's answer; this process ends if the child has died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            sys.exit(f"{' '.join(self.command)} died with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the child."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def take_turns(
    names: Sequence[str], questions: Sequence[Any], arguments: Sequence[str]
) -> dict[str, list[dict[str, float]]]:
    """The answers of every side to all questions, one question after the other; a side has `arguments` and its name."""
    sides = {name: Side(["--side", name, *arguments]) for name in names}
    replies: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number, question in enumerate(questions):
        for name, side in sides.items():
            replies[name].append(side.ask(question))
            print(f"step {number} {name}: {replies[name][-1]}", file=sys.stderr)
    for side in sides.values():
        side.close()
    return replies


def serve(make: Callable[[], Callable[[Any], Any]], *, retain_memory: bool = False) -> None:
    """Runs the child: `make` returns the function that answers until the parent has no more questions.

    With `retain_memory` the child keeps memory that it frees, as a potstill run does.
    """
    from potstill.core.memory import retain_freed_memory

    out, sys.stdout = sys.stdout, sys.stderr  # libraries print; the parent reads one line an answer
    with retain_freed_memory() if retain_memory else contextlib.nullcontext():
        answer = make()
        for line in sys.stdin:
            out.write(json.dumps(answer(json.loads(line))) + "\n")
            out.flush()


def ask_once(arguments: Sequence[str], question: Any = None) -> Any:
    """One answer of a child that ends afterwards."""
    side = Side(arguments)
    try:
        return side.ask(question)
    finally:
        side.close()
