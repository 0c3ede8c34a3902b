"""A policy that is better in English keeps its French under the gate alone.

It writes English or French, and is right in 9 of 10 English and 6 of 10 French answers to a French question. Its
logits follow the exact gradient of the expected advantage, which group scaling divides by the standard deviation.
"""

import pytest
import torch
from tests.train.rewards.test_language import detect_words
from tests.train.rewards.test_m_thinker import ENGLISH_THINKING, THINKING

from potstill.train.rewards.accuracy import Accuracy
from potstill.train.rewards.base import Completion, Reward
from potstill.train.rewards.language import Language
from potstill.train.rewards.m_thinker import MThinker
from potstill.train.rewards.weighted import RewardSum, RewardTerm

RIGHT = {"en": 0.9, "fr": 0.6}
SOFT = RewardSum(
    (
        RewardTerm(name="accuracy", weight=0.9, reward=Accuracy()),
        RewardTerm(name="language", weight=0.1, reward=Language(detect_words)),
    )
)


@pytest.mark.parametrize(
    ("reward", "low", "high"),
    [(Accuracy(), 0.0, 0.01), (SOFT, 0.0, 0.01), (MThinker(detector=detect_words), 0.99, 1.0)],
    ids=["accuracy", "slc_rl", "m_thinker"],
)
def test_only_the_gate_keeps_a_policy_from_its_easier_language(reward: Reward, low: float, high: float) -> None:
    share = train_share_of_french(reward, steps=400)
    assert low <= share <= high


def train_share_of_french(reward: Reward, *, steps: int) -> float:
    """The probability of French after training."""
    thinking = {"en": ENGLISH_THINKING, "fr": THINKING}
    row = {"answer": "40", "language": "fr"}
    completions = [
        Completion("", f"{thinking[language]}</think>\\boxed{{{answer}}}", row, ended=True)
        for language in RIGHT
        for answer in (40, 41)
    ]
    rewards = torch.tensor(reward(completions), dtype=torch.float64).view(2, 2)
    skill = torch.tensor([[p, 1 - p] for p in RIGHT.values()], dtype=torch.float64)
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        language = logits.softmax(0)
        probability = language.detach()[:, None] * skill
        mean = (probability * rewards).sum()
        deviation = (probability * (rewards - mean) ** 2).sum().sqrt()
        advantage = (skill * (rewards - mean)).sum(1) / (deviation + 1e-6)
        (gradient,) = torch.autograd.grad((language * advantage).sum(), logits)
        logits = (logits + 0.5 * gradient).detach().requires_grad_()
    return float(logits.detach().softmax(0)[1])
