"""Our architecture among Hugging Face's: it opens, saves, generates, pads, trains and refuses as stock models do."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.cache_utils import Cache

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.errors import ArtifactError, UnsupportedModel, UsageError
from potstill.core.types import Needs
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.families.registry import import_model
from potstill.models.hf_causal_lm import AutoModelForCausalLM, PotstillConfig, PotstillForCausalLM
from potstill.models.signals import compute_signals, probe_model

UNEVEN = Blueprint(
    60,
    16,
    (Layer(Attention(4, 2, 8), SwiGLU(24)), Layer(Attention(2, 1, 6, qk_norm=True, window=4), SwiGLU(10))),
    context=64,
).update_extras({"eos_token_id": 59, "pad_token_id": 58, "initializer_range": 0.3})


def model(*, tied: bool = False) -> PotstillForCausalLM:
    return PotstillForCausalLM(PotstillConfig.from_blueprint(replace(UNEVEN, tied=tied))).eval()


def ids(rows: int = 2, size: int = 9) -> torch.Tensor:
    return torch.randint(50, (rows, size))


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_opens_through_the_auto_class_unchanged(tied: bool, tmp_path: Path) -> None:
    ours, tokens = model(tied=tied), ids()
    ours.save_pretrained(tmp_path)
    again, problems = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values())
    assert isinstance(again, PotstillForCausalLM)
    assert again.backbone.blueprint == replace(UNEVEN, tied=tied)
    assert torch.equal(again(tokens).logits, ours(tokens).logits)
    assert again.num_parameters() == ours.num_parameters()


def test_importing_the_module_is_all_that_opening_a_folder_needs(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    code = (
        "from potstill import AutoModelForCausalLM;"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "PotstillForCausalLM"


def test_the_saved_config_is_the_blueprint_and_says_nothing_twice(tmp_path: Path) -> None:
    model().config.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert Blueprint.from_dict(data["blueprint"]) == UNEVEN
    assert not {"vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings"} & set(data)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (60, 16, 2)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (59, 58, None)


def test_fresh_weights_follow_the_blueprint_s_range() -> None:
    fresh = model()
    assert float(fresh.backbone.embed.weight.detach().std()) == pytest.approx(0.3, rel=0.1)
    assert float(fresh.backbone.head.weight.detach().std()) == pytest.approx(0.3, rel=0.1)
    assert bool((fresh.backbone.layers[1].mixer.q_norm.weight == 1).all())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_generation_without(tied: bool, beams: int) -> None:
    ours, tokens = model(tied=tied), ids()
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 58}
    cached = ours.generate(tokens, use_cache=True, **options)
    assert cached.tolist() == ours.generate(tokens, use_cache=False, **options).tolist()
    assert cached.shape[1] > tokens.shape[1]


def test_generation_takes_a_cache_of_our_own_states() -> None:
    ours, tokens = model(), ids()
    cache = Cache(layers=ours.backbone.make_states())
    mine = ours.generate(tokens, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert cache.get_seq_length() == mine.shape[1] - 1
    assert mine.tolist() == ours.generate(tokens, max_new_tokens=8, do_sample=False).tolist()


def test_without_positions_the_text_goes_on_where_the_cache_ends() -> None:
    ours, tokens = model(), ids()
    first = ours(tokens[:, :5], use_cache=True)
    rest = ours(tokens[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, ours(tokens).logits[:, 5:], rtol=0, atol=1e-5)
    assert ours(tokens).past_key_values is None


def test_a_prompt_padded_on_the_left_generates_what_it_generates_alone() -> None:
    ours, tokens = model(), ids(1, 6)
    padded = torch.cat([torch.full((1, 4), 58), tokens], 1)
    mask = (padded != 58).long()
    rows = torch.cat([padded, ids(1, 10)])
    masks = torch.cat([mask, torch.ones(1, 10, dtype=torch.long)])
    alone = ours.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    both = ours.generate(rows, attention_mask=masks, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert both[0, 10:].tolist() == alone[0, 6:].tolist()


def test_it_assists_a_stock_model_and_is_assisted() -> None:
    """Speculative decoding by `generate` crops the caches of both."""
    ours, other, tokens = model(), model(tied=True), ids(1)
    plain = ours.generate(tokens, max_new_tokens=10, do_sample=False)
    assert ours.generate(tokens, assistant_model=other, max_new_tokens=10, do_sample=False).tolist() == plain.tolist()


def test_logits_loss_and_hidden_states_are_the_stock_model_s(tiny_llama: LlamaForCausalLM) -> None:
    ours = PotstillForCausalLM(PotstillConfig.from_blueprint(import_model(tiny_llama).blueprint)).eval()
    ours.backbone.load_state_dict(import_model(tiny_llama).state_dict())
    tokens, mask = ids(3), torch.ones(3, 9, dtype=torch.long)
    mask[0, 6:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    mine, stock = (m(tokens, attention_mask=mask, labels=labels, output_hidden_states=True) for m in (ours, tiny_llama))
    torch.testing.assert_close(mine.loss, stock.loss)
    torch.testing.assert_close(mine.logits[mask.bool()], stock.logits[mask.bool()], rtol=0, atol=1e-5)
    assert len(mine.hidden_states) == len(stock.hidden_states) == 4
    for one, other in zip(mine.hidden_states, stock.hidden_states, strict=True):
        torch.testing.assert_close(one[mask.bool()], other[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([2, 5])])
def test_only_the_logits_asked_for_are_made(kept: int | torch.Tensor) -> None:
    ours, tokens = model(), ids()
    some = ours(tokens, logits_to_keep=kept).logits
    rows = slice(-kept, None) if isinstance(kept, int) else kept
    torch.testing.assert_close(some, ours(tokens).logits[:, rows])


def test_packed_documents_do_not_see_one_another_without_further_ado() -> None:
    ours, one, other = model(), ids(1, 5), ids(1, 6)
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
    packed = ours(torch.cat([one, other], 1), position_ids=positions).logits
    torch.testing.assert_close(packed, torch.cat([ours(one).logits, ours(other).logits], 1), rtol=0, atol=1e-5)


def test_embeddings_stand_in_for_tokens_and_a_tuple_for_the_output() -> None:
    ours, tokens = model(), ids()
    embedded = ours.get_input_embeddings()(tokens)
    assert torch.equal(ours(inputs_embeds=embedded, return_dict=False)[0], ours(tokens).logits)


def test_hugging_face_s_trainer_trains_it_with_checkpointing(tmp_path: Path) -> None:
    ours = model().train()
    ours.gradient_checkpointing_enable()
    assert ours.backbone.gradient_checkpointing
    data = [{"input_ids": row, "labels": row} for row in ids(8)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    before = ours(data[0]["input_ids"][None], labels=data[0]["labels"][None]).loss.item()
    Trainer(ours, arguments, train_dataset=data).train()
    assert ours(data[0]["input_ids"][None], labels=data[0]["labels"][None]).loss.item() < before


@pytest.mark.parametrize("tied", [False, True])
def test_the_module_whose_weight_makes_the_logits_is_found(tied: bool) -> None:
    ours, tokens = model(tied=tied), ids()
    head = ours.get_output_embeddings()
    rows = ours.base_model(tokens).last_hidden_state
    torch.testing.assert_close(ours(tokens).logits, rows @ head.weight.T)
    assert (head is ours.get_input_embeddings()) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_a_student_like_any_other_with_its_head_and_packing_explained(tied: bool) -> None:
    ours, lengths = model(tied=tied), (5, 6)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    batch = {"input_ids": ids(1, 11), "position_ids": positions}
    needs = Needs(positions=positions >= 0, layers=frozenset({1}))
    assert probe_model(ours).supports_packing
    assert probe_model(ours).has_known_head
    said = compute_signals(ours, batch, needs)
    alone = [ours(part, output_hidden_states=True) for part in batch["input_ids"].split(lengths, 1)]
    torch.testing.assert_close(said.logits(said.rows), torch.cat([x.logits[0] for x in alone]), rtol=0, atol=1e-5)
    layers = torch.cat([x.hidden_states[1][0] for x in alone])
    torch.testing.assert_close(said.layers[1], layers, rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", [{}, {"input_ids": ids(), "inputs_embeds": torch.zeros(2, 9, 16)}])
def test_tokens_and_embeddings_are_given_one_at_a_time(given: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UsageError, match="exactly one"):
        model()(**given)


def test_a_mask_that_is_no_padding_is_refused() -> None:
    with pytest.raises(UsageError, match=r"shape \(2, 1, 9, 9\)"):
        model()(ids(), attention_mask=torch.ones(2, 1, 9, 9))


def test_resizing_the_vocabulary_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedModel, match="fixed by its blueprint"):
        model().resize_token_embeddings(70)


def test_a_config_without_a_blueprint_says_so() -> None:
    with pytest.raises(ArtifactError, match="has no blueprint"):
        PotstillConfig()
