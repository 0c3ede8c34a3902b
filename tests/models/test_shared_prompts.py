"""Answers that share a prompt are what they are with a prompt each, in every network; no network drops it."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.models.networks import T5, build
from tests.models.shared import ANSWERS, PROMPTS, shared_batch, shared_packs
from tests.models.small import SMALL
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    T5ForConditionalGeneration,
)

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.depth import Depth
from potstill.core.types import Needs, supervised_positions
from potstill.data.packing import collate
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.layers.mixers.delta_net import DeltaNet
from potstill.layers.mixers.gated_attention import GatedAttention
from potstill.layers.mixers.mlgru import MLGRU
from potstill.models import signals
from potstill.models.backbone import init_weights
from potstill.models.hf_causal_lm import PotstillForCausalLM
from potstill.models.hf_config import PotstillConfig
from potstill.models.packed_attention import is_prompt_shared
from potstill.models.signals import ModelProbe, compute_signals, probe_model
from potstill.ops.layout import repeat_prompts, unpack

GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
ATTENTION = Attention(4, 2, 8)
SHARING: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4),
    "gpt2": GPT2Config(**GPT2),
    "attention": (Layer(ATTENTION, SwiGLU(48)), Layer(GatedAttention(4, 2, 8, window=3), SwiGLU(48))),
    "depth": tuple(Layer(ATTENTION, SwiGLU(48), depth=Depth(threshold)) for threshold in (0.4, 0.5)),
}
REPEATING: dict[str, Any] = {
    "delta_net": (Layer(DeltaNet(2, 2, 8, 8), SwiGLU(48)), Layer(ATTENTION, SwiGLU(48))),
    "mlgru": (Layer(ATTENTION, SwiGLU(48)), Layer(MLGRU(32), SwiGLU(48), depth=Depth(0.4))),
    "gpt_oss": GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4),
    "bloom": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "mamba": MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.3),
}
ALL = SHARING | REPEATING


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(1)
    description = ALL[name]
    if not isinstance(description, tuple):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(description)).eval()  # whose attention a probe sets
        for key, weight in model.named_parameters():
            weight.data += 3 * torch.randn_like(weight) if key.endswith("sinks") else 0
        return model if name == "gpt_oss" else model.double()  # its experts know no float64
    model = PotstillForCausalLM(PotstillConfig.from_blueprint(Blueprint(97, 32, description, context=64)))
    init_weights(model.backbone, std=0.3)
    return model.eval().double()


def rows_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    return compute_signals(model, batch, Needs(supervised_positions(batch)[0])).rows


def gradients(model: PreTrainedModel, *batches: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, a sum over the supervised rows, and its gradients, summed over these passes."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        found = compute_signals(model, batch, Needs(supervised_positions(batch)[0]))
        log_p = found.logits(found.rows).log_softmax(-1)
        loss = -log_p.gather(1, supervised_positions(batch)[1][:, None]).sum()
        loss.backward()
        total += loss.detach()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total, found


def assert_same(
    a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]], *, tolerance: float = 1e-6
) -> None:
    """Equal up to the float32 of norms and rotary angles, which stock models have in float64 too."""
    torch.testing.assert_close(a[0], b[0], rtol=tolerance, atol=0)
    assert a[1].keys() == b[1].keys()
    for name, gradient in a[1].items():
        limit = tolerance * float(b[1][name].abs().max())
        torch.testing.assert_close(gradient, b[1][name], rtol=0, atol=limit, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("name", ALL)
def test_shared_prompts_give_the_loss_and_every_gradient_of_repeated_ones(name: str) -> None:
    model, batch = model_of(name), shared_batch()
    whole = repeat_prompts(batch)
    assert "offsets" in batch
    assert whole["input_ids"].shape[1] == batch["input_ids"].shape[1] + 2 * (PROMPTS[0] - 1 + PROMPTS[2] - 1)
    assert probe_model(model).supports_shared_prompts is (name in SHARING)
    tolerance = 1e-4 if name == "gpt_oss" else 1e-6
    assert_same(gradients(model, batch), gradients(model, whole), tolerance=tolerance)


@pytest.mark.parametrize("name", ALL)
def test_shared_prompts_give_the_rows_of_each_text_alone(name: str) -> None:
    model, batch = model_of(name), shared_batch()
    whole = unpack(batch)
    alone = []
    for ids, numbers, labels in zip(whole["input_ids"], whole["documents"], whole["labels"], strict=True):
        length = int((numbers >= 0).sum())
        with torch.no_grad():
            output = model(input_ids=ids[None, :length], use_cache=False, output_hidden_states=True)
        is_trained = labels[1:length] != -100
        alone.append(output.hidden_states[-1][0, : length - 1][is_trained])
    with torch.no_grad():
        torch.testing.assert_close(rows_of(model, batch), torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "depth"])
def test_a_packed_batch_of_shared_prompts_is_its_padded_one_and_two_passes_are_one(name: str) -> None:
    model = model_of(name)
    together = gradients(model, shared_batch())
    assert_same(gradients(model, *(collate([pack]) for pack in shared_packs())), together)
    signals._probes[model] = ModelProbe(has_known_head=True, supports_packing=False, takes_position_ids=True)
    assert_same(gradients(model, shared_batch()), together)
    assert_same(gradients(model, unpack(shared_batch())), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_answer_moves_nothing_in_the_answers_beside_it(dtype: torch.dtype) -> None:
    model, batch = model_of("llama").to(dtype), shared_batch()
    changed = {**batch, "input_ids": torch.where(batch["documents"] == 1, 5, batch["input_ids"])}
    documents = supervised_positions(batch)[2]
    with torch.no_grad():
        before, after = rows_of(model, batch), rows_of(model, changed)
    assert torch.equal(before[documents != 1], after[documents != 1])
    assert not torch.equal(before[documents == 1], after[documents == 1])


def test_a_stock_mask_drops_the_prompt_without_an_error_so_it_is_never_used() -> None:
    model, batch = model_of("llama"), shared_batch()
    last = batch["documents"] == 2  # the second answer to the first prompt
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        stock = model.model(**inputs, use_cache=False).last_hidden_state[last]
        forgotten = model.model(
            **{name: values[last][None] for name, values in inputs.items()}, use_cache=False
        ).last_hidden_state[0]
    torch.testing.assert_close(stock, forgotten, rtol=1e-6, atol=1e-6)
    assert not is_prompt_shared(model)
    with torch.no_grad():
        rows = compute_signals(model, batch, Needs(last)).rows
    assert (rows - stock).abs().max() > 0.1
    assert probe_model(model).supports_shared_prompts


@pytest.mark.parametrize("share", [0.37, 0.02])
def test_a_network_whose_answers_see_one_another_is_found_out(share: float) -> None:
    model = model_of("llama").float()
    assert probe_model(model).supports_shared_prompts

    def leak(module: Any, args: Any, output: Any) -> Any:
        states = output[0]
        mean = states.cumsum(1) / torch.arange(1, states.shape[1] + 1)[:, None]
        return ((1 - share) * states + share * mean, *output[1:])

    handle = model.model.layers[0].self_attn.register_forward_hook(leak)
    assert not is_prompt_shared(model)
    handle.remove()
    assert is_prompt_shared(model)


def test_a_repeated_prompt_without_needed_rows_is_not_computed() -> None:
    model, batch, seen = model_of("mlgru"), shared_batch(), []
    probe_model(model)
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    rows_of(model, batch)
    handle.remove()
    wholes = sum(prompt + length for prompt, answers in zip(PROMPTS, ANSWERS, strict=True) for length in answers)
    assert seen[0] in range(wholes + 6, wholes + 6 + 32)  # the text too, up to a multiple of 32


def test_rows_of_the_prompt_itself_are_the_same_where_it_is_repeated() -> None:
    batch = shared_batch()
    needs = Needs(torch.ones_like(batch["input_ids"], dtype=torch.bool))
    model = model_of("llama")
    with torch.no_grad():
        shared = compute_signals(model, batch, needs).rows
        signals._probes[model] = ModelProbe(has_known_head=True, supports_packing=True, takes_position_ids=True)
        repeated = compute_signals(model, batch, needs).rows
    torch.testing.assert_close(shared, repeated, rtol=1e-9, atol=1e-9)


def test_a_decoder_that_reads_a_source_repeats_the_prompt_too() -> None:
    model = build(T5ForConditionalGeneration, T5).double()
    batch = collate(shared_packs()[1:])
    sources = {
        "source.input_ids": torch.tensor([[7, 8, 9] * 3]),
        "source.position_ids": torch.arange(3).repeat(3)[None],
        "source.documents": torch.arange(3).repeat_interleave(3)[None],
    }
    with torch.no_grad():
        torch.testing.assert_close(
            rows_of(model, batch | sources), rows_of(model, {**repeat_prompts(batch), **sources}), rtol=1e-9, atol=1e-9
        )
