"""An answer to one prompt."""

from pathlib import Path

import pytest
from tests.stages.world import saved
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import potstill
from potstill.core.errors import NotFound
from potstill.stages.generate_text import generate_text


def test_a_prompt_is_rendered_by_the_template_of_a_file(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = str(saved(tmp_path / "model", tiny_llama, tiny_tokenizer))
    file = tmp_path / "own.jinja"
    file.write_text("Be kind. " + str(tiny_tokenizer.chat_template))
    answers = [
        generate_text(
            model, "Hi", max_tokens=1, temperature=0.0, raw=False, device="cpu", seed=1, chat_template=template
        )
        for template in (None, str(file))
    ]
    assert answers[1]["prompt_tokens"] - answers[0]["prompt_tokens"] == len("Be kind. ")
    with pytest.raises(NotFound, match="there is no file"):
        potstill.generate(model, "Hi", chat_template=str(tmp_path / "none.jinja"))
