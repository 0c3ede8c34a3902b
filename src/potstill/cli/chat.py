"""A chat in the terminal: turns from stdin, answers on stdout as they are written, all else on stderr."""

import contextlib
import io
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from types import FrameType

from potstill.cli.stream import describe_answer, print_answer
from potstill.core.errors import PotstillError
from potstill.core.notes import print_note
from potstill.core.suggestions import suggest
from potstill.decode.answer_stream import AnswerStream
from potstill.stages.chat import Chat

PROMPT = "> "
COMMANDS = {
    "/clear": "forget the conversation; the system prompt stays",
    "/system TEXT": "set the system prompt; without a text there is none",
    "/exit": "end the chat, as Ctrl-D does",
    "/help": "show these commands",
}
HELP = "\n".join(
    [
        *(f"{name:<14} {meaning}" for name, meaning in COMMANDS.items()),
        "Ctrl-C         stop the answer; a second time, end the chat",
        "A line that begins with a space is text, also before a /.",
    ]
)


class ChatScreen:
    """Asks for turns and prints answers, until /exit or the end of stdin."""

    def __init__(self, chat: Chat, *, draft_style: str = "") -> None:
        self.chat, self.draft_style = chat, draft_style
        self.is_terminal = sys.stdin.isatty()
        self._is_answering = False
        self._answer: AnswerStream | None = None
        self._num_interrupts = 0  # since the last turn

    def run(self, first_turn: str | None = None) -> None:
        """Carry on the chat; `first_turn` is asked before stdin is read."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        with self._handle_interrupts() if self.is_terminal else contextlib.nullcontext():
            if self.is_terminal:
                print_note("/help lists the commands; Ctrl-D ends the chat")
            if first_turn is not None:
                if self.is_terminal:
                    print(f"{PROMPT}{first_turn}", file=sys.stderr)
                self._ask(first_turn)
            while (line := self._read_line()) is not None:
                if line.startswith("/"):
                    if line.split()[0] == "/exit":
                        return
                    self._run_command(line)
                elif line.strip():
                    self._ask(line.strip())

    def _ask(self, question: str) -> None:
        """Print the answer to a turn, or why there is none."""
        self._is_answering = True
        try:
            self._answer = answer = self.chat.ask(question)
            if self._num_interrupts:
                answer.cancel()
            print_answer(answer, draft_style=self.draft_style)
            print_note(describe_answer(answer))
        except PotstillError as error:
            print(f"error: {error}", file=sys.stderr)
        finally:
            self._is_answering, self._answer = False, None

    def _run_command(self, line: str) -> None:
        name, _, text = line.partition(" ")
        if name == "/clear":
            self.chat.clear()
            print_note("the conversation is empty")
        elif name == "/system":
            self.chat.system = text.strip()
            print_note("the system prompt is set" if self.chat.system else "there is no system prompt")
        elif name == "/help":
            print(HELP, file=sys.stderr)
        else:
            names = [command.split()[0] for command in COMMANDS]
            print(f"error: there is no command {name}{suggest(name, names)}; /help lists them", file=sys.stderr)

    def _read_line(self) -> str | None:
        """The next line without its end; empty after a first Ctrl-C, None at the end of stdin or after a second one."""
        try:
            line = self._input()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if not self._num_interrupts:  # another signal ends the program
                raise
            if self._num_interrupts > 1:
                return None
            print_note("Ctrl-C again, or Ctrl-D, ends the chat")
            return ""
        if line is None and self.is_terminal:
            print(file=sys.stderr)  # Ctrl-D leaves the cursor behind the prompt
        self._num_interrupts = 0
        return line

    def _input(self) -> str | None:
        if self.is_terminal and sys.stdout.isatty():
            with contextlib.suppress(ImportError):  # a Python without it reads plain lines
                import_module("readline")  # `input` then edits the line, and remembers former ones
            try:
                return input(PROMPT)
            except EOFError:
                return None
        if self.is_terminal:
            print(PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None

    @contextlib.contextmanager
    def _handle_interrupts(self) -> Iterator[None]:
        """Ctrl-C ends the answer that is printed; elsewhere, or a second time, it raises KeyboardInterrupt."""

        def handle(signal_number: int, frame: FrameType | None) -> None:
            self._num_interrupts += 1
            if not self._is_answering or self._num_interrupts > 1:
                raise KeyboardInterrupt
            if self._answer is not None:
                self._answer.cancel()

        previous = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
