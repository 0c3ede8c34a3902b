"""Accuracy alone, or with a bonus, collapses to the easier language; behind a gate it does not."""

import pytest
from benchmarks.setting.toy_policy import make_answers, make_rewards, train_choice

TABLE = {  # of a wrong and a right answer in French, then in English
    "accuracy": [0, 1, 0, 1],
    "0.9*accuracy+0.1*language": [0.1, 1, 0, 0.9],
    "m_thinker": [0, 1, -1, -1],
}


@pytest.mark.parametrize(("name", "collapses"), [(name, name != "m_thinker") for name in TABLE])
def test_a_policy_collapses_to_the_easier_language_unless_there_is_a_gate(name: str, collapses: bool) -> None:
    reward = make_rewards()[name]
    assert reward(make_answers()) == pytest.approx(TABLE[name])
    french = train_choice(reward)
    assert french < 0.02 if collapses else french > 0.98
