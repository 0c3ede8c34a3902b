r"""The accuracy of answers, and verifiers that raise, hang, swallow errors or die."""

import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import DataError, RewardFailed
from potstill.train.rewards import verifier
from potstill.train.rewards.accuracy import Accuracy
from potstill.train.rewards.base import Completion
from potstill.train.rewards.verifier import MathVerifier

PARABOLA = ("x^2+2x+1", "(x+1)^2")


def complete(text: str, answer: Any) -> Completion:
    return Completion("", text, {"answer": answer}, ended=True)


def boxed(answer: str) -> str:
    return rf"\boxed{{{answer}}}"


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("3 + 4 = 7", "7", 1.0),
        ("3 + 4 = 8", "7", 0.0),
        ("I cannot say", "7", 0.0),
        (r"The answer is \boxed{1{,}234}.", "1234", 1.0),
        (r"\boxed{50\%} of 12", "1/2", 1.0),
        ("so $18 in all.", "9 * 2 = <<9*2=18>>18\n#### 18", 1.0),
        ("I think 8</think>7", 7, 1.0),
        ("I think 7</think>nothing", 7, 0.0),
        (r"\boxed{\text{Paris}}", "Paris", 1.0),
        (r"\boxed{olleh}", "hello", 0.0),
    ],
)
def test_the_final_answer_is_compared(text: str, answer: Any, value: float) -> None:
    assert Accuracy()([complete(text, answer)]) == [value]


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        (r"\boxed{\dfrac12}", "0.5", 1.0),
        (r"\boxed{7} and </think> 8", "7", 1.0),
        ("7", "7", 0.0),
        (r"\boxed{1,234}", "1234", 0.0),
    ],
)
def test_the_official_accuracy_compares_the_last_box_as_a_string(text: str, answer: Any, value: float) -> None:
    assert Accuracy("official")([complete(text, answer)]) == [value]


def test_a_row_without_an_answer_is_refused() -> None:
    for row in ({}, {"answer": None}, {"answer": " "}):
        with pytest.raises(DataError, match="a row has no `answer` to compare with"):
            Accuracy()([Completion("", "7", row, ended=True)])


@pytest.fixture(scope="module")
def math_verify() -> Iterator[MathVerifier]:
    """math-verify in a process with little patience."""
    pytest.importorskip("math_verify", reason="math-verify is not installed; run: pip install 'potstill[align]'")
    process = MathVerifier(time_limit=1.0)
    yield process
    process.close()


def test_formulas_are_compared_as_mathematics(math_verify: MathVerifier) -> None:
    math_verify.time_limit = 30.0  # a busy machine takes more than a second
    accuracy = Accuracy(verifier=math_verify)
    first, second = PARABOLA
    assert accuracy.notes == ()
    pairs = [
        (boxed(second), first),
        (boxed(r"2\sqrt{3}"), r"\sqrt{12}"),
        (boxed("x+1"), "x+2"),
        (boxed(r"\frac{"), "x^2"),
    ]
    assert accuracy([complete(*pair) for pair in pairs]) == [1.0, 1.0, 0.0, 0.0]
    assert not accuracy.failures


def test_an_answer_that_exhausts_the_verifier_counts_as_wrong_and_is_noticed(
    math_verify: MathVerifier, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = Accuracy(verifier=math_verify)
    bomb = complete(boxed("9^{9^{9^{9}}}+x"), "x^2")
    assert accuracy([bomb]) == [0.0]
    pattern = r"warning: math-verify .* on '9\^\{9\^\{9\^\{9\}\}\}\+x', which counts as a wrong answer"
    assert re.search(pattern, capsys.readouterr().err)
    assert sum(accuracy.failures.values()) == 1


def test_without_math_verify_formulas_are_compared_as_strings_and_a_note_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verifier, "find_spec", lambda name: None)
    accuracy = Accuracy()
    assert accuracy([complete(boxed("x + 1"), "x+1"), complete(boxed(PARABOLA[0]), PARABOLA[1])]) == [1.0, 0.0]
    assert "pip install 'potstill[align]'" in accuracy.notes[0]


def make_verifier(tmp_path: Path, reply: str) -> MathVerifier:
    """A verifier whose replies are the value of the expression `reply` of `reference` and `answer`."""
    script = tmp_path / "verifier.py"
    script.write_text(
        "import json, sys, time\n"
        "TRUTH = {('1/2', '0.5'): {'equal': True}, ('1/2', '1/3'): {'equal': False}}\n"
        "for line in sys.stdin:\n"
        "    reference, answer = json.loads(line)\n"
        f"    print(json.dumps({reply}), flush=True)\n"
    )
    return MathVerifier([sys.executable, "-S", str(script)], time_limit=1.0)


WORKS_FOR_PROBES = "TRUTH.get((reference, answer)) or "


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ("{'equal': False}", "calls 1/2 and 0.5 different"),
        ("{'equal': True}", "calls 1/2 and 1/3 equal"),
        ("{'error': 'ImportError: no sympy'}", "fails with ImportError: no sympy"),
        ("sys.exit()", "stops without a verdict"),
        ("None", "stops without a verdict"),
    ],
)
def test_a_verifier_that_swallows_its_errors_is_found_at_its_start(tmp_path: Path, reply: str, sentence: str) -> None:
    accuracy = Accuracy(verifier=make_verifier(tmp_path, reply))
    with pytest.raises(RewardFailed, match=f"math-verify does not work: it {sentence}; reinstall it"):
        accuracy([complete(boxed(PARABOLA[0]), PARABOLA[1])])


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        ("time.sleep(60)", "takes more than 1 seconds"),
        ("{'error': 'TypeError: no order'}", "fails with TypeError: no order"),
        ("sys.exit()", "stops without a verdict"),
    ],
)
def test_a_verifier_that_hangs_raises_or_dies_is_noticed_and_goes_on(
    tmp_path: Path, reply: str, failure: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: a verifier that swallows an error. The command line hides Python's warnings, and shows this one."""
    monkeypatch.setattr(warnings, "warn", None)
    bad = f"({reply} if 'bad' in answer else {{'equal': True}})"
    accuracy = Accuracy(verifier=make_verifier(tmp_path, WORKS_FOR_PROBES + bad))
    completions = [complete(boxed("bad^1"), "x^2"), complete(boxed(PARABOLA[0]), PARABOLA[1])]
    assert accuracy(completions) == [0.0, 1.0]
    assert f"warning: math-verify {failure} on 'bad^1', which counts as a wrong answer" in capsys.readouterr().err
    assert accuracy.failures == {failure: 1}


def test_a_verifier_that_fails_on_everything_stops_the_run(tmp_path: Path) -> None:
    accuracy = Accuracy(verifier=make_verifier(tmp_path, WORKS_FOR_PROBES + "{'error': 'OSError: full'}"))
    completions = [complete(boxed(f"x^{n}"), "y^2") for n in range(8)]
    with pytest.raises(RewardFailed, match="math-verify fails with OSError: full for all 8 answers"):
        accuracy(completions)


def test_numbers_and_words_never_reach_the_verifier(tmp_path: Path) -> None:
    accuracy = Accuracy(verifier=make_verifier(tmp_path, "sys.exit()"))
    completions = [complete(boxed("8"), "7"), complete(boxed("Rome"), "Paris"), complete(boxed("x" * 2000), "x^2")]
    assert accuracy(completions) == [0.0, 0.0, 0.0]
