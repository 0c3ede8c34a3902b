"""A saved model names every token that ends its answers."""

import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.models.load import LoadedModel
from potstill.stages.saved_model import save_model


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
