"""What a model says through its rows and its head is what it says itself, family by family."""

import gc
import weakref
from typing import Any

import pytest
import torch
from tests.models.small import SMALL
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from potstill.core.errors import UnsupportedModel
from potstill.core.types import IGNORE, Needs, supervised_positions
from potstill.data.packing import collate
from potstill.models.packed_attention import is_packing_isolated
from potstill.models.signals import compute_signals, get_head, is_head_reproduced, probe_model
from potstill.objectives.cross_entropy import CrossEntropy
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.train.training_module import TrainingModule

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
    "bloom": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "mamba": MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.3),
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
    positions, targets, segment = supervised_positions(batch)
    with torch.no_grad():
        said = compute_signals(model, batch, Needs(positions))
        found = said.logits(said.rows)
    torch.testing.assert_close(found, alone.to(found.dtype), rtol=1e-5, atol=1e-5)
    assert segment.tolist() == [i for i, n in enumerate(LENGTHS) for _ in range(n - 1)]
    assert targets.tolist() == [int(t) for d in documents for t in d[1:]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "cohere", "granite"])
def test_common_families_are_packed_and_their_heads_are_explained(family: str) -> None:
    found = probe_model(model_of(CONFIGS[family]))
    assert found.supports_packing
    assert found.has_known_head


def test_a_head_is_cut_to_the_real_ids() -> None:
    model = model_of(CONFIGS["llama"])
    batch = collate([{"input_ids": torch.arange(3, 13), "labels": torch.arange(3, 13), "lengths": torch.tensor([10])}])
    said = compute_signals(model, batch, Needs(supervised_positions(batch)[0]), vocabulary=90)
    assert said.logits(said.rows).shape == (9, 90)


def test_generating_still_works_for_a_model_that_packs() -> None:
    model = model_of(CONFIGS["llama"])
    ids = torch.randint(3, 97, (2, 7))
    ids[1, :3] = 0
    mask = (ids != 0).long()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    before = model.generate(ids, attention_mask=mask, **options)
    probe_model(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), before)
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **options), before)


@pytest.mark.parametrize(
    ("family", "bias", "scale", "softcap"),
    [
        ("phi", True, 1.0, None),
        ("cohere", False, 0.25, None),
        ("granite", False, 0.25, None),
        ("gemma2", False, 1.0, 5.0),
        ("gemma3", False, 1.0, 5.0),
    ],
)
def test_bias_scale_and_softcap_of_a_family_are_found(
    family: str, bias: bool, scale: float, softcap: float | None
) -> None:
    head = get_head(model_of(CONFIGS[family]))
    assert (head.bias is not None, head.scale, head.softcap) == (bias, scale, softcap)


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_a_model_that_takes_no_positions_is_padded(family: str) -> None:
    found = probe_model(model_of(CONFIGS[family]))
    assert not found.takes_position_ids
    assert not found.supports_packing
    assert found.has_known_head


class Doubled(LlamaForCausalLM):
    """A head that no config explains."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def one_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (20,), generator=torch.Generator().manual_seed(1))
    return collate([{"input_ids": ids, "labels": ids, "lengths": torch.tensor([8, 12])}])


def test_a_model_whose_head_is_not_explained_still_teaches_with_its_own_logits() -> None:
    torch.manual_seed(1)
    model, batch = Doubled(CONFIGS["llama"]).eval(), one_batch()
    assert not probe_model(model).has_known_head
    positions, *_ = supervised_positions(batch)
    said = compute_signals(model, batch, Needs(positions), vocabulary=90)
    assert said.head is None
    own = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    torch.testing.assert_close(said.logits(said.rows[3:9]), own[positions][3:9, :90])
    study = TrainingModule(model_of(CONFIGS["llama"]).float(), LogitDistillation(), frozen={"teacher": model})
    study(**batch)["loss"].backward()


def test_a_model_whose_head_is_not_explained_cannot_be_a_student() -> None:
    model = Doubled(CONFIGS["llama"])
    with pytest.raises(UnsupportedModel, match="head is not a plain linear layer"):
        TrainingModule(model, CrossEntropy())(**one_batch())


def test_needs_that_a_model_cannot_meet_are_refused() -> None:
    model, batch = model_of(CONFIGS["llama"]), one_batch()
    positions, *_ = supervised_positions(batch)
    with pytest.raises(UnsupportedModel, match="router"):
        compute_signals(model, batch, Needs(positions, extras=frozenset({"router"})))
    with pytest.raises(ValueError, match="name the positions"):
        compute_signals(model, batch, Needs())


def test_layers_that_were_asked_for_are_the_hidden_states_at_the_same_rows() -> None:
    model, batch = model_of(CONFIGS["llama"]), one_batch()
    positions, *_ = supervised_positions(batch)
    said = compute_signals(model, batch, Needs(positions, layers=frozenset({0, 1})))
    states = model.model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, output_hidden_states=True
    ).hidden_states
    assert sorted(said.layers) == [0, 1]
    for layer, rows in said.layers.items():
        torch.testing.assert_close(rows, states[layer][positions])


def test_the_probe_does_not_keep_a_model_alive() -> None:
    model = model_of(CONFIGS["llama"])
    probe_model(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_probe_leaves_mixed_modes_as_they_were(tiny_llama):
    tiny_llama.train()
    frozen = tiny_llama.model.layers[0].eval()
    is_head_reproduced(tiny_llama)
    is_packing_isolated(tiny_llama)
    assert not any(module.training for module in frozen.modules())
    assert tiny_llama.training
    assert tiny_llama.model.layers[1].training
