"""Packed documents do not see one another, and nothing else about a model changes."""

from typing import Any

import pytest
import torch
from tests.models.networks import BERT, build
from tests.models.small import SMALL
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from potstill.models.packed_attention import ATTENTION_NAME, install_packed_attention, is_packing_isolated

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, pad_token_id=0
    ),
}
LENGTHS = (11, 6, 17)


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[family]).eval().double()


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 97, (1, n), generator=generator) for n in LENGTHS]


def packed() -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat(documents(), 1),
        "position_ids": torch.cat([torch.arange(n)[None] for n in LENGTHS], 1),
    }


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", CONFIGS)
def test_a_pack_gives_the_logits_and_gradients_of_each_document_by_stock_attention(family: str) -> None:
    stock, ours = model_of(family), model_of(family)
    assert install_packed_attention(ours)
    assert ours.config._attn_implementation == ATTENTION_NAME
    alone = torch.cat([stock(input_ids=d, use_cache=False).logits for d in documents()], 1)
    together = ours(**packed(), use_cache=False).logits
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(alone)
    (weights * alone).sum().backward()
    (weights * together).sum().backward()
    for name, gradient in gradients(stock).items():
        torch.testing.assert_close(gradients(ours).get(name, gradient), gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_padded_rows_give_what_stock_attention_gives(family: str, rows: int) -> None:
    stock, ours = model_of(family), model_of(family)
    install_packed_attention(ours)
    ids = torch.randint(3, 97, (rows, 9))
    mask = torch.ones_like(ids)
    mask[-1, :4] = 0
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    real = mask.bool()
    torch.testing.assert_close(ours(**given).logits[real], stock(**given).logits[real], rtol=1e-5, atol=1e-5)
    bare: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    torch.testing.assert_close(ours(**bare).logits, stock(**bare).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_generating_is_unchanged_with_and_without_padding_and_cache(family: str) -> None:
    stock, ours = model_of(family), model_of(family)
    install_packed_attention(ours)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 97, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for rows in (ids, ids[:1], ids[:1, :1]):
        for cache in (True, False):
            for seen in (torch.ones_like(rows), mask[:, :9] if len(rows) == 2 else torch.ones_like(rows)):
                given = {"attention_mask": seen, "use_cache": cache, **options}
                assert torch.equal(ours.generate(rows, **given), stock.generate(rows, **given))


DROPOUT: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.3, resid_pdrop=0.0, embd_pdrop=0.0, pad_token_id=0
    ),
    "granite": GraniteConfig(**SMALL, attention_dropout=0.3),
}


@pytest.mark.parametrize("family", DROPOUT)
def test_attention_dropout_acts_in_training_as_in_stock_attention_and_not_in_eval_mode(family: str) -> None:
    def draw(model: PreTrainedModel, given: dict[str, Tensor], seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(**given, use_cache=False).logits

    stock, ours = (AutoModelForCausalLM.from_config(DROPOUT[family]).double() for _ in range(2))
    ours.load_state_dict(stock.state_dict())
    assert install_packed_attention(ours)
    document = {"input_ids": documents()[2], "position_ids": torch.arange(LENGTHS[2])[None]}
    stock.train(), ours.train()
    torch.testing.assert_close(draw(ours, document, 5), draw(stock, document, 5), rtol=1e-5, atol=1e-5)
    first, again, other = (draw(ours, packed(), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.01 * first.abs().max()
    ours.eval()
    assert torch.equal(draw(ours, packed(), 1), draw(ours, packed(), 2))


def test_positions_that_do_not_restart_mix_documents_so_the_probe_has_something_to_find() -> None:
    model, ids = model_of("llama"), packed()["input_ids"]
    alone = torch.cat([model(input_ids=d, use_cache=False).logits for d in documents()], 1)
    mixed = model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False).logits
    assert (mixed - alone).abs().max() > 0.1


class Leaking(LlamaForCausalLM):
    """A Llama that forgets where documents begin."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.forward = self._leak(self.model.forward)

    @staticmethod
    def _leak(forward: Any) -> Any:
        def leaking(input_ids: Tensor, position_ids: Tensor | None = None, **rest: Any) -> Any:
            return forward(input_ids=input_ids, position_ids=None, **rest)

        return leaking


def test_a_model_that_mixes_documents_is_found_out_and_keeps_its_attention() -> None:
    torch.manual_seed(1)
    model = Leaking(CONFIGS["llama"]).eval()
    before = model.config._attn_implementation
    assert not install_packed_attention(model)
    assert not is_packing_isolated(model)
    assert model.config._attn_implementation == before


def test_a_model_without_positions_cannot_be_packed() -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)).eval()
    assert not install_packed_attention(model)


def test_the_probe_leaves_the_mode_as_it_found_it() -> None:
    model = model_of("llama")
    for mode in (True, False):
        model.train(mode)
        assert is_packing_isolated(model)
        assert model.training is mode


def test_the_boundaries_of_one_batch_are_not_taken_for_those_of_the_next() -> None:
    model = model_of("llama")
    install_packed_attention(model)
    ids = torch.cat(documents(), 1)
    places = torch.arange(ids.shape[1])[None]
    whole = model(input_ids=ids, position_ids=places, use_cache=False).logits
    places[:, 11:] = torch.arange(ids.shape[1] - 11)[None]  # the same tensor, changed in place
    cut = model(input_ids=ids, position_ids=places, use_cache=False).logits
    alone = model(input_ids=ids[:, 11:], use_cache=False).logits
    torch.testing.assert_close(cut[:, 11:], alone, rtol=1e-5, atol=1e-5)
    assert (whole[:, 11:] - alone).abs().max() > 0.1


def test_a_model_whose_attention_knows_more_than_ours_keeps_its_own() -> None:
    torch.manual_seed(0)
    config = GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.normal_(std=3)
    ids = torch.arange(3, 15)[None]
    before = model(input_ids=ids, use_cache=False).logits
    install_packed_attention(model)
    assert model.config._attn_implementation != ATTENTION_NAME
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_honest_models_are_isolated_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval().to(dtype)
    assert is_packing_isolated(model)  # by its own attention
    assert install_packed_attention(model)
    assert is_packing_isolated(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixer_that_leaks_a_third_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval().to(dtype)

    def leak(module: Any, args: Any, output: Any) -> Any:
        states = output[0]
        mean = states.cumsum(1) / torch.arange(1, states.shape[1] + 1, device=states.device)[:, None]
        return (0.63 * states + 0.37 * mean.to(states.dtype), *output[1:])

    handle = model.model.layers[0].self_attn.register_forward_hook(leak)
    assert not install_packed_attention(model)
    assert not is_packing_isolated(model)
    handle.remove()
    assert is_packing_isolated(model)


def test_a_bidirectional_model_keeps_its_own_attention() -> None:
    model = build(BertForMaskedLM, BERT).to(torch.bfloat16)
    own = model.config._attn_implementation
    assert not install_packed_attention(model)
    assert model.config._attn_implementation == own
