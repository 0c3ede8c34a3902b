"""A policy that chooses between two languages, of which the one that is not asked for is easier.

The question is French, and the policy answers in French or in English, each with probability 1/2 at first. It is right
in 4 of 10 French answers and in 8 of 10 English ones. It only learns which language to choose, by policy gradients over
groups: the advantages, the loss and the rewards are potstill's own.

Source: the collapse that M-Thinker describes (arXiv:2510.07300, section 3), reduced to one choice. Ours.
"""

import torch

from potstill.ops.advantage import compute_group_advantages
from potstill.ops.policy_gradient import policy_loss
from potstill.train.rewards.accuracy import Accuracy
from potstill.train.rewards.base import Completion
from potstill.train.rewards.language import Language
from potstill.train.rewards.m_thinker import MThinker
from potstill.train.rewards.weighted import RewardSum, RewardTerm

LANGUAGES = ("fr", "en")
SKILLS = torch.tensor([0.4, 0.8])  # the share of right answers in each
WORDS = {"fr": "la somme est donc la suivante", "en": "the sum is therefore this one"}
ROW = {"answer": "5", "language": "fr"}
PROMPTS, SAMPLES = 8, 8


def detect_language(text: str) -> str:
    """French for a text with its words, else English."""
    return "fr" if WORDS["fr"] in text else "en"


def make_rewards() -> dict[str, RewardSum]:
    """Accuracy alone, with a tenth for the language, and behind M-Thinker's gate."""
    accuracy, language = Accuracy(), Language(detect_language)
    return {
        "accuracy": RewardSum((RewardTerm(name="accuracy", reward=accuracy),)),
        "0.9*accuracy+0.1*language": RewardSum(
            (
                RewardTerm(name="accuracy", reward=accuracy, weight=0.9),
                RewardTerm(name="language", reward=language, weight=0.1),
            )
        ),
        "m_thinker": RewardSum((RewardTerm(name="m_thinker", reward=MThinker(minimum=1, detector=detect_language)),)),
    }


def make_answers() -> list[Completion]:
    """A wrong and a right answer in each language."""
    return [
        Completion("2 + 3 ?", f"{WORDS[language]} </think> {WORDS[language]} {answer}", ROW, ended=True)
        for language in LANGUAGES
        for answer in (4, 5)
    ]


def train_choice(reward: RewardSum, *, steps: int = 200, learning_rate: float = 1.0, seed: int = 0) -> float:
    """The probability of French after `steps` of 8 groups of 8 samples."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.tensor(reward(make_answers())).view(2, 2)  # [language, right]
    groups = torch.arange(PROMPTS).repeat_interleave(SAMPLES)
    logits = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=learning_rate)
    for _ in range(steps):
        log_p = logits.log_softmax(-1)
        choices = torch.multinomial(log_p.exp().detach(), len(groups), replacement=True, generator=generator)
        is_right = torch.rand(len(groups), generator=generator) < SKILLS[choices]
        advantages = compute_group_advantages(rewards[choices, is_right.long()], groups)
        loss = policy_loss(log_p[choices], log_p[choices].detach(), advantages).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(logits.detach().softmax(-1)[0])
