"""A saved model names every token that ends its answers, and has the weights that were measured."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import UsageError
from potstill.models.load import LoadedModel
from potstill.models.saving import round_weights
from potstill.stages.saved_model import save_checked_model, save_model


@pytest.mark.parametrize(("eos", "ids"), [("<|endoftext|>", [0, 2]), ("<|im_end|>", 2)])
def test_a_saved_student_stops_where_its_template_ends_an_answer(
    eos: str,
    ids: list[int] | int,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    tiny_tokenizer.eos_token = eos
    tiny_llama.generation_config.eos_token_id = tiny_tokenizer.eos_token_id
    origin = LoadedModel(tiny_llama, tiny_tokenizer, "origin", tmp_path, None, "")
    save_model(tiny_llama, origin, tmp_path / "student")
    saved = json.loads((tmp_path / "student" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_saved_weights_are_those_in_memory_after_rounding(
    dtype: torch.dtype, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder, before = tmp_path / "student", {k: v.clone() for k, v in tiny_llama.state_dict().items()}
    origin = LoadedModel(tiny_llama, tiny_tokenizer, "origin", tmp_path, None, "")
    round_weights(tiny_llama, dtype)
    record = save_checked_model(tiny_llama, origin, folder, dtype=dtype)
    assert record["outcome"] == "equal within 0.0e+00"
    saved = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {dtype}
    assert all(torch.equal(weight, before[name].to(dtype)) for name, weight in saved.items())
    assert {weight.dtype for weight in tiny_llama.state_dict().values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype
    assert tiny_llama.config.tie_word_embeddings == ("lm_head.weight" not in saved)


def test_a_weight_beyond_the_range_of_float16_is_refused_and_nothing_changes(tiny_llama: LlamaForCausalLM) -> None:
    with torch.no_grad():
        tiny_llama.model.norm.weight[0] = 1e6
    before = {name: weight.clone() for name, weight in tiny_llama.state_dict().items()}
    with pytest.raises(UsageError, match=r"model\.norm\.weight.*65504.*--save-dtype bfloat16"):
        round_weights(tiny_llama, torch.float16)
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_llama.state_dict().items())
