"""Tiny random networks that are no decoders, and batches for them."""

from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, PreTrainedModel, RobertaConfig, T5Config

from potstill.core.types import IGNORE
from potstill.data.packing import collate

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
BERT = BertConfig(**SIZES, pad_token_id=0)
ROBERTA = RobertaConfig(**SIZES, pad_token_id=1, bos_token_id=0, eos_token_id=2)
T5 = T5Config(
    vocab_size=97,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    pad_token_id=0,
    decoder_start_token_id=0,
    initializer_factor=3.0,
)
LENGTHS = (11, 6, 17)


def build(cls: type[PreTrainedModel], config: Any, **changes: Any) -> PreTrainedModel:
    """A random model in eval mode."""
    config = config.__class__(**{**config.to_diff_dict(), **changes})
    torch.manual_seed(1)
    model: PreTrainedModel = cls(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.3)  # a bias that is forgotten shows
    return model


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(5, 97, (n,), generator=generator) for n in lengths]


def packed(texts: list[Tensor]) -> dict[str, Tensor]:
    """One packed row of them, every token of which is trained on."""
    return collate([{"input_ids": ids, "labels": ids, "lengths": torch.tensor([len(ids)])} for ids in texts])


def masked(texts: list[Tensor], *, mask_id: int = 4) -> dict[str, Tensor]:
    """The same row with every third token masked; the masked tokens are its targets."""
    batch = packed(texts)
    is_masked = batch["position_ids"] % 3 == 1
    targets = torch.where(is_masked, batch["input_ids"], IGNORE)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(is_masked, mask_id), "targets": targets}
