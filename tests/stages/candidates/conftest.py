"""A model that ends most of its answers, and questions in two languages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.world import saved, written
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.stages.candidates.config import CandidatesConfig

QUESTIONS = {"en": "What is {} + 1?", "fr": "Combien font {} + 1 ?"}
REWARDS = '''
"""Rewards for answers that are random letters."""

import pathlib

def has_upper(completions, share=0.0):
    """1 for an answer with a capital letter."""
    return [float(any(map(str.isupper, c.completion))) for c in completions]

def fails_once(completions):
    """Raises at the first call, as a judge that cannot be reached."""
    file = pathlib.Path(__file__).with_name("called")
    if not file.exists():
        file.touch()
        raise KeyError("judge")
    return has_upper(completions)

def never(completions):
    return [0.0] * len(completions)

def of_answer(completions):
    """1 for an answer in whose first letters the row's answer is."""
    return [float(c.row["answer"] in c.completion) for c in completions]
'''


@pytest.fixture
def speaker(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model that ends most of its answers."""
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[2] = 3 * tiny_llama.model.embed_tokens.weight[40]
    return saved(tmp_path / "speaker", tiny_llama, tiny_tokenizer)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Ten questions in English and French; those of an odd number are of the higher tier."""
    rows: list[Any] = [
        {"id": n, "language": language, "prompt": text.format(n), "answer": str(n + 1), "tier": n % 2}
        for n in range(10)
        for language, text in QUESTIONS.items()
    ]
    return written(tmp_path / "questions.jsonl", rows)


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    """A file of rewards."""
    file = tmp_path / "rewards.py"
    file.write_text(REWARDS)
    return file


@pytest.fixture
def stage(speaker: Path, questions: Path, rewards: Path) -> CandidatesConfig:
    """A selection of mixed prompts."""
    return CandidatesConfig(
        model=str(speaker),
        data=str(questions),
        select="mixed",
        reward=f"{rewards}:has_upper",
        samples=4,
        max_tokens=8,
        temperature=1.0,
        dtype="float32",
    )
