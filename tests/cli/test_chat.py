"""A chat through a pipe and in a terminal: what is on stdout, what is on stderr, and what the keys do."""

import io
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.cli.conftest import Call
from tests.stages.world import saved
from tests.tiny import byte_tokenizer, random_llama

from potstill.core.screen import Verbosity, set_verbosity

GREEN, UNDERLINED, RESET = "\x1b[32m", "\x1b[4m", "\x1b[0m"
NOTE = re.compile(
    r"note: \d+ tokens? at [\d,.]+ tokens/s; prompt: \d+ tokens? at [\d,.]+ tokens/s( and \d+ from before)?"
)
DRAFT = ("--draft", "lookup", "--draft-length", "4", "--show")


@pytest.fixture
def ascii_model(tmp_path: Path) -> Path:
    """A tiny model whose text is printable as it is, with room for an endless answer."""
    tokenizer = byte_tokenizer(ascii=True)
    return saved(tmp_path / "model", random_llama(tokenizer, context=200_000), tokenizer)


def say(monkeypatch: pytest.MonkeyPatch, *lines: str | bytes) -> None:
    """Standard input holds these lines."""
    data = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_each_line_of_a_pipe_is_a_turn_and_stdout_has_the_answers_alone(
    potstill: Call, monkeypatch: pytest.MonkeyPatch, ascii_model: Path
) -> None:
    say(
        monkeypatch,
        "Hi",
        "",
        "/system Be kind.",
        "Who?",
        "/hlp",
        "/help",
        " /usr is a folder",
        "/clear",
        "Hi",
        "/exit",
        "No",
    )
    answer = potstill("generate", ascii_model, "--chat", "--max-tokens", 6)
    assert answer.code == 0
    notes = answer.err.splitlines()
    assert [bool(NOTE.match(line)) for line in notes].count(True) == 4
    assert "note: the system prompt is set" in notes
    assert "error: there is no command /hlp (did you mean '/help'?); /help lists them" in notes
    assert any(line.startswith("/system TEXT   set the system prompt") for line in notes)
    assert "note: the conversation is empty" in notes
    single = potstill("generate", ascii_model, "--prompt", "Hi", "--max-tokens", 6)
    assert answer.out.startswith(single.out)
    assert NOTE.fullmatch(single.err.splitlines()[-1].partition("; the answer has reached its limit of 6 tokens")[0])


def test_the_prompt_is_the_first_turn_and_quiet_hides_the_notes(
    potstill: Call, monkeypatch: pytest.MonkeyPatch, ascii_model: Path
) -> None:
    say(monkeypatch, "Who?")
    call = ("generate", ascii_model, "--chat", "--max-tokens", 6)
    both = potstill(*call, "--prompt", "Hi", "--quiet")
    set_verbosity(Verbosity.NORMAL)
    assert both.err == ""
    say(monkeypatch, "Hi", "Who?")
    assert potstill(*call).out == both.out


def test_a_turn_that_is_refused_or_no_text_does_not_end_the_chat(
    potstill: Call, monkeypatch: pytest.MonkeyPatch, ascii_model: Path
) -> None:
    say(monkeypatch, "a<|im_end|>", b"\xff\xfe", "Hi")
    answer = potstill("generate", ascii_model, "--chat", "--max-tokens", 6, "--special-in-text", "refuse")
    assert answer.code == 0
    assert "error: its text contains 1 control token" in answer.err
    assert len(NOTE.findall(answer.err)) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param(("--chat", "--data", "d", "--out", "o"), "--chat answers you, and --data", id="a data set"),
        pytest.param(("--chat", "--raw"), "--chat needs the chat template, which --raw leaves out", id="no template"),
        pytest.param(("--chat", "--json"), "--chat prints text as it is written; omit --json", id="json"),
        pytest.param(("--chat", "--prompt", "-"), "--chat reads its turns from standard input", id="stdin twice"),
        pytest.param(("--chat", "--show"), "say with --draft what drafts", id="nothing to color"),
        pytest.param(("--prompt", "a", "--show"), "say with --draft what drafts", id="nothing to color in an answer"),
        pytest.param((*DRAFT, "--prompt", "a", "--json"), "--json prints none; omit one of them", id="color in json"),
        pytest.param(("--data", "d", "--out", "o", *DRAFT), "omit it with --data", id="a draft for a data set"),
        pytest.param((), "--prompt for one answer, --chat for a chat, or --data", id="nothing"),
    ],
)
def test_a_call_that_makes_no_sense_is_one_sentence(potstill: Call, more: Sequence[str], message: str) -> None:
    answer = potstill("generate", "model", *more)
    assert (answer.code, answer.out) == (2, "")
    assert len(answer.err.splitlines()) == 1
    assert message in answer.err


@pytest.mark.parametrize(
    ("environment", "mark", "legend"),
    [
        ({}, "", "--show marks tokens on a terminal only; here the text is plain"),
        ({"FORCE_COLOR": "1"}, GREEN, "what the draft wrote and the model kept is green"),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, UNDERLINED, "what the draft wrote and the model kept is underlined"),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, "", "--show marks tokens on a terminal only"),
    ],
    ids=["pipe", "color", "no color", "dumb"],
)
def test_what_the_draft_wrote_is_marked_on_a_terminal(
    environment: dict[str, str],
    mark: str,
    legend: str,
    potstill: Call,
    monkeypatch: pytest.MonkeyPatch,
    ascii_model: Path,
) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    call = ("generate", ascii_model, "--prompt", "Hi Hi Hi", "--max-tokens", 60)
    plain, shown = potstill(*call), potstill(*call, *DRAFT)
    assert f"note: {legend}" in shown.err
    assert re.search(r"; [1-9]\d* of \d+ draft tokens kept, \d\.\d tokens per pass", shown.err)
    assert shown.out.replace(mark, "").replace(RESET, "") == plain.out
    if mark:
        assert mark in shown.out
        assert shown.out.count(mark) == shown.out.count(RESET)
    else:
        assert shown.out == plain.out


# a process of its own, since a process with threads should not fork
IN_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


def drive(*call: str, steps: Sequence[tuple[str, bytes]], seconds: float = 100.0) -> tuple[str, int]:
    """The screen and the exit code of a program in a terminal; each step types a text once another one is shown."""
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": ""}
    line = [sys.executable, "-c", IN_TERMINAL, *call]
    screen, seen, remaining, deadline = b"", 0, list(steps), time.monotonic() + seconds
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([process.stdout], [], [], 0.1)[0]:
                screen += os.read(process.stdout.fileno(), 65536)
            if remaining and (position := screen.find(remaining[0][0].encode(), seen)) >= 0:
                seen = position + len(remaining[0][0])
                time.sleep(0.1)
                process.stdin.write(remaining.pop(0)[1])
        process.kill()
        screen += process.stdout.read()
    return screen.decode(), process.returncode


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_chat(ascii_model: Path) -> None:
    call = (sys.executable, "-m", "potstill", "generate", str(ascii_model), "--chat", "--max-tokens", "100000", *DRAFT)
    steps = [
        ("\n> ", b"Hi\r"),
        (GREEN, b"\x03"),
        ("\n> ", b"/clear\r"),
        ("\n> ", b"\x1b[A\x7f\x7f\x7f\x7f\x7fhelp\r"),  # the line before, edited
        ("\n> ", b"\x03"),
        ("ends the chat\r\n> ", b"\x04"),
    ]
    screen, code = drive(*call, steps=steps)
    assert code == 0
    assert "note: /help lists the commands; Ctrl-D ends the chat" in screen
    assert "what the draft wrote and the model kept is green" in screen
    assert re.search(r"note: \d+ tokens at [\d,.]+ tokens/s", screen)
    assert "note: the conversation is empty" in screen
    assert "/system TEXT   set the system prompt" in screen
    assert "note: Ctrl-C again, or Ctrl-D, ends the chat" in screen
    assert screen.endswith("> \r\n")
