"""The small world of whole runs."""

from pathlib import Path

import pytest
import torch
from tests.stages.world import pairs, saved, short_samples, teacher, text
from tests.tiny import random_llama
from transformers import PreTrainedTokenizerFast

__all__ = ["pairs", "short_samples", "teacher", "text"]

DIGITS = ("1", "2")


@pytest.fixture
def guesser(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model whose next token is 1, 2 or the end, each as likely, so that some of its answers are right."""
    model = random_llama(tiny_tokenizer, tied=False, context=512)
    tokens = [*map(tiny_tokenizer.convert_tokens_to_ids, DIGITS), tiny_tokenizer.eos_token_id]
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.1)[:, 0] = 5.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()[tokens, 0] = 2.0
    return saved(tmp_path / "guesser", model, tiny_tokenizer)
