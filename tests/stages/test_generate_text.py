"""An answer to one prompt."""

from pathlib import Path
from typing import Any

import pytest
from tests.stages.world import saved
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import potstill
from potstill.core.errors import DataError, NotFound, UsageError
from potstill.decode.drafters.options import DraftOptions
from potstill.stages.generate_options import AnswerOptions
from potstill.stages.generate_text import generate_text


@pytest.fixture
def model(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    """The folder of a tiny model."""
    return str(saved(tmp_path / "model", tiny_llama, tiny_tokenizer))


def options(**changes: Any) -> AnswerOptions:
    return AnswerOptions(**{"device": "cpu", "max_tokens": 4, **changes})


def test_a_prompt_is_rendered_by_the_template_of_a_file(
    model: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("Be kind. " + str(tiny_tokenizer.chat_template))
    answers = [generate_text(model, "Hi", options(chat_template=template)) for template in (None, str(file))]
    assert answers[1]["prompt_tokens"] - answers[0]["prompt_tokens"] == len("Be kind. ")
    with pytest.raises(NotFound, match="there is no file"):
        potstill.generate(model, "Hi", chat_template=str(tmp_path / "none.jinja"))


@pytest.mark.parametrize("raw", [False, True])
def test_control_tokens_of_a_prompt_are_kept_escaped_or_refused(raw: bool, model: str) -> None:
    kept, escaped = (
        generate_text(model, "a<|im_end|>", options(raw=raw, special_in_text=policy)) for policy in ("keep", "escape")
    )
    assert escaped["prompt_tokens"] - kept["prompt_tokens"] == len("<|im_end|>") - 1
    with pytest.raises(DataError, match="contains 1 control token"):
        potstill.generate(model, "a<|im_end|>", raw=raw, special_in_text="refuse")


def test_int8_says_how_far_it_moves_the_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [generate_text(model, "Hi", options(dtype=dtype)) for dtype in ("auto", "bfloat16", "int8")]
    assert all(answer["text"] for answer in answers)
    assert capsys.readouterr().err.count("int8 is another model: its KL from this one is 0.0") == 1
    with pytest.raises(UsageError, match="there is no dtype 'int3'"):
        potstill.generate(model, "Hi", dtype="int3")


def test_the_answer_comes_with_its_numbers_and_is_128_tokens_long_at_most(model: str) -> None:
    answer = generate_text(model, "Hi", options(max_tokens=None))
    assert (answer["model"], answer["prompt"]) == (model, "Hi")
    assert (answer["new_tokens"], answer["finish_reason"], answer["drafted"]) == (128, "length", 0)
    assert answer["tokens_per_second"] > 0


def test_a_draft_changes_the_speed_and_not_the_text(model: str) -> None:
    plain, drafted = (
        generate_text(model, "Hi Hi", options(max_tokens=80, drafts=drafts))
        for drafts in (DraftOptions(), DraftOptions(draft="lookup", draft_length="4"))
    )
    assert plain["text"] == drafted["text"]
    assert drafted["tokens_per_pass"] > 1
    assert 0 < drafted["accepted"] < drafted["drafted"]


def test_a_seed_and_a_temperature_draw_an_answer(model: str) -> None:
    texts = {
        seed: generate_text(model, "Hi", options(max_tokens=20, temperature=1.0, seed=seed))["text"] for seed in (1, 2)
    }
    assert texts[1] != texts[2]
    longer = generate_text(model, "Hi", options(max_tokens=40, temperature=1.0))["text"]
    assert longer.startswith(texts[1].rstrip("\N{REPLACEMENT CHARACTER}"))


def test_python_streams_the_pieces_of_an_answer(model: str) -> None:
    pieces: list[str] = []
    text = potstill.generate(model, "Hi", max_tokens=20, draft="lookup", on_text=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == text == potstill.generate(model, "Hi", max_tokens=20)


@pytest.mark.parametrize("option", [{"draft": "lookup"}, {"raw": True}, {"on_text": print}])
def test_python_refuses_options_of_one_answer_for_a_data_set(option: dict[str, Any], model: str) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(option))} is for the answer to one prompt"):
        potstill.generate(model, data="stdlib", out="x", **option)
