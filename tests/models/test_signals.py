"""What a model says through its rows and its head is what it says itself, family by family."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from potstill.core.types import IGNORE, Needs, supervised
from potstill.data.pack import collate
from potstill.models.signals import network, signals

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADED = {"head_dim": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, **HEADED),
    "gemma2": Gemma2Config(**SMALL, **HEADED, final_logit_softcapping=5.0, sliding_window=4),
    "gemma3": Gemma3TextConfig(**SMALL, **HEADED, final_logit_softcapping=5.0, sliding_window=4),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "granite": GraniteConfig(**SMALL, logits_scaling=4.0),
    "phi": PhiConfig(**{**SMALL, "num_key_value_heads": 4}),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
}
LENGTHS = (11, 6, 17)


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    # Gemma 2 attends eagerly, with a float32 softmax: a float64 mask overflows in it, and a padded query becomes NaN
    return model if config.model_type == "gemma2" else model.double()


@pytest.mark.parametrize("family", CONFIGS)
def test_rows_and_head_of_a_pack_are_the_logits_of_each_document_alone(family: str) -> None:
    model = model_of(CONFIGS[family])
    documents = [torch.randint(3, 97, (n,)) for n in LENGTHS]
    batch = collate([{"input_ids": d, "labels": d, "lengths": torch.tensor([len(d)])} for d in documents])
    labels = batch["labels"].clone()
    labels[batch["position_ids"] == 0] = IGNORE
    batch["labels"] = labels
    alone = torch.cat([model(input_ids=d[None], use_cache=False).logits[0, :-1] for d in documents])
    positions, targets, segment = supervised(batch)
    with torch.no_grad():
        said = signals(model, batch, Needs(positions))
        found = said.logits(said.rows)
    torch.testing.assert_close(found, alone.to(found.dtype), rtol=1e-5, atol=1e-5)
    assert segment.tolist() == [i for i, n in enumerate(LENGTHS) for _ in range(n - 1)]
    assert targets.tolist() == [int(t) for d in documents for t in d[1:]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "cohere", "granite"])
def test_common_families_are_packed_and_their_heads_are_explained(family: str) -> None:
    found = network(model_of(CONFIGS[family]))
    assert found.packs
    assert found.head_known


def test_a_head_is_cut_to_the_real_ids() -> None:
    model = model_of(CONFIGS["llama"])
    batch = collate([{"input_ids": torch.arange(3, 13), "labels": torch.arange(3, 13), "lengths": torch.tensor([10])}])
    said = signals(model, batch, Needs(supervised(batch)[0]), vocabulary=90)
    assert said.logits(said.rows).shape == (9, 90)


def test_generating_still_works_for_a_model_that_packs() -> None:
    model = model_of(CONFIGS["llama"])
    ids = torch.randint(3, 97, (2, 7))
    ids[1, :3] = 0
    mask = (ids != 0).long()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    before = model.generate(ids, attention_mask=mask, **options)
    network(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), before)
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **options), before)
