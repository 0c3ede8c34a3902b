"""Rewards by name, their sums, and what happens to one that raises, hangs, or returns no number."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import DataError, NotFound, RewardFailed, UsageError
from potstill.train.rewards.base import Completion, check_rewards, register_reward, score_completions
from potstill.train.rewards.registry import get_reward, list_rewards
from potstill.train.rewards.weighted import RewardSum, RewardTerm

USER_FILE = '''
"""Rewards of a user."""

def brevity(completions, limit=20):
    """1 for a short completion."""
    return [float(len(c.completion) < limit) for c in completions]

class Ended:
    def __init__(self, bonus=1.0, is_on=True):
        self.bonus, self.is_on = bonus, is_on
    def __call__(self, completions):
        return [self.bonus * c.ended * self.is_on for c in completions]

class Scorer(Ended):
    def score(self, text):
        """A method of the user's own."""
'''


def complete(text: str, **row: Any) -> Completion:
    return Completion(prompt="What is 3 + 4?", completion=text, row=row, ended=True)


SUMS = [complete("It is 7.", answer="7"), complete("It is 8.", answer="7")]


def test_every_reward_has_a_name_a_help_and_its_columns() -> None:
    rewards = list_rewards()
    assert {"accuracy", "language", "format", "thinking", "m_thinker", "slc_rl"} <= set(rewards)
    assert all(spec.help and spec.name == name for name, spec in rewards.items())
    assert rewards["m_thinker"].columns == ("answer", "language")
    with pytest.raises(ValueError, match="two rewards are called 'accuracy'"):
        register_reward("accuracy", help="again")(lambda: lambda completions: [])


def test_a_sum_of_rewards_has_its_weights_and_gives_every_term() -> None:
    reward = get_reward("0.9*accuracy + 0.1*format:minimum=3")
    scores = reward.score_terms(SUMS)
    assert scores.totals == [0.9, 0.0]
    assert scores.terms == {"accuracy": [1.0, 0.0], "format": [0.0, 0.0]}
    assert reward(SUMS) == scores.totals
    assert reward.columns == ("answer",)


def test_the_terms_of_a_term_are_given_too(tmp_path: Path) -> None:
    terms = get_reward("m_thinker:minimum=2").score_terms([complete("a</think>7", answer=7, language="en")]).terms
    expected = {"m_thinker": [1.0], "m_thinker.language": [0.0], "m_thinker.gated_accuracy": [1.0]}
    assert terms == {**expected, "m_thinker.thinking": [0.0]}
    scores = get_reward("2*slc_rl").score_terms([complete("Das ist die Zahl sieben, 7.", answer=7, language="de")])
    assert (scores.totals, scores.terms["slc_rl"]) == ([2.0], [1.0])
    assert (scores.terms["slc_rl.accuracy"], scores.terms["slc_rl.language"]) == ([1.0], [1.0])


def test_a_user_s_file_is_a_reward_with_options_and_a_digest(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USER_FILE)
    assert get_reward(f"{file}:brevity")(SUMS) == [1.0, 1.0]
    assert get_reward(f"2*{file}:brevity:limit=5+accuracy")(SUMS) == [1.0, 0.0]
    assert get_reward(f"{file}:Ended:bonus=0.5")(SUMS) == [0.5, 0.5]
    assert get_reward(f"{file}:Ended:is_on=0")(SUMS) == get_reward(f"{file}:Ended:is_on=false")(SUMS) == [0.0, 0.0]
    assert get_reward(f"{file}:Ended:is_on=True")(SUMS) == [1.0, 1.0]
    with pytest.raises(UsageError, match="has is_on='no'; give is_on=1 or is_on=0"):
        get_reward(f"{file}:Ended:is_on=no")
    assert get_reward(f"{file}:Scorer")(SUMS) == [1.0, 1.0]
    assert len(get_reward(f"{file}:brevity").digests["brevity"]) == 64
    with pytest.raises(UsageError, match=r"defines no function or class 'length'; it defines brevity, Ended, Scorer"):
        get_reward(f"{file}:length")
    with pytest.raises(NotFound, match=r"no readable file .*other.py for --reward"):
        get_reward(f"{tmp_path}/other.py:brevity")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("acuracy", r"no reward 'acuracy' \(did you mean 'accuracy'\?\); choose one of accuracy, format"),
        ("x*accuracy", "begins with no number"),
        ("nan*accuracy", "has the weight nan; write a finite one"),
        ("accuracy+accuracy", "'accuracy' twice"),
        ("format:maximum=3", "has no option 'maximum' .did you mean 'minimum'."),
        ("format:minimum=long", "give a number such as minimum=1000"),
        ("format:minimum=1,minimum=2", "'minimum' twice"),
        ("format:minimum=-1", "at least 0"),
        ("accuracy:verifier=x", "has no option 'verifier'; it has compat"),
        ("accuracy:compat=old", "it can be clean or official"),
        ("language:detector=lingo", "no language detector 'lingo'"),
        ("thinking:judge=http://localhost:1/v1#m", "cannot open a judge here"),
        ("", "is not NAME"),
    ],
)
def test_a_wrong_name_or_option_is_refused_with_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        get_reward(text)


def test_a_judge_is_opened_by_its_address() -> None:
    addresses = []

    def open_judge(address: str) -> Any:
        addresses.append(address)
        return lambda prompts: ["<score>0.5</score>"] * len(prompts)

    reward = get_reward("thinking:judge=http://localhost:1/v1#m", open_judge=open_judge)
    assert addresses == ["http://localhost:1/v1#m"]
    assert reward([complete("7", solution="3 + 4 = 7")]) == [0.5]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1.0], "returns 1 values for 2 completions"),
        ([1.0, float("nan")], "returns nan"),
        ([1.0, float("inf")], "returns inf"),
        (None, "returns a NoneType that holds no numbers"),
        ([1.0, None], "returns a list that holds no numbers"),
        (3.0, "returns a float"),
    ],
)
def test_a_reward_that_returns_no_number_for_each_completion_is_refused(values: Any, sentence: str) -> None:
    with pytest.raises(RewardFailed, match=f"mine {sentence}"):
        check_rewards(values, 2, "mine")


def test_a_reward_that_raises_is_named_with_its_error() -> None:
    def broken(completions: Sequence[Completion]) -> list[float]:
        return [completion.row["points"] for completion in completions]

    reward = RewardSum((RewardTerm(name="broken", reward=broken),))
    with pytest.raises(RewardFailed, match="broken raises KeyError: 'points'; fix it"):
        reward(SUMS)


def test_an_error_of_potstill_stays_what_it_is() -> None:
    with pytest.raises(DataError, match="no `answer`"):
        get_reward("accuracy")([complete("7")])


def test_a_reward_that_hangs_is_left_after_its_time() -> None:
    released = threading.Event()

    def endless(completions: Sequence[Completion]) -> list[float]:
        released.wait(60)
        return [0.0] * len(completions)

    with pytest.raises(RewardFailed, match=r"endless gives no values for 2 completions within 0.05 seconds"):
        score_completions(endless, SUMS, name="endless", time_limit=0.05)
    released.set()
