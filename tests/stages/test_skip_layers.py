"""Layers to skip, from prompts to what `--draft` takes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.world import saved
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import potstill
from potstill.core.errors import OutputExists, UsageError
from potstill.stages.skip_layers import SkipLayersConfig


@pytest.fixture
def stage(teacher: Path, pairs: Path) -> SkipLayersConfig:
    return SkipLayersConfig(model=str(teacher), data=str(pairs), documents=2, max_tokens=16, longest=3, dtype="float32")


def test_the_card_has_what_draft_takes_and_what_it_rests_on(stage: SkipLayersConfig, tmp_path: Path) -> None:
    card = stage.run(tmp_path / "made")
    assert {file.name for file in (tmp_path / "made").iterdir()} == {"card.json"}
    assert json.loads((tmp_path / "made" / "card.json").read_text())["stage"] == stage.to_dict()
    draft = card.details["draft"]
    names = [measure.name for measure in card.measures[draft]]
    assert names == ["acceptance", "tokens_per_pass", "predicted_speed_up"]
    assert set(card.details["speed_up_by_length"]) == {1, 2, 3}
    best = max(card.details["speed_up_by_length"].values())
    assert card.measures[draft][2].value == best
    assert draft in card.details["advice"]
    assert ("omit --draft" in card.details["advice"]) == (best <= 1)
    texts = [
        potstill.generate(stage.model, "a wash a wash", raw=True, max_tokens=20, draft=name) for name in (None, draft)
    ]
    assert texts[0] == texts[1]
    with pytest.raises(OutputExists):
        stage.run(tmp_path / "made")


def test_a_model_of_one_layer_has_none_to_skip(
    stage: SkipLayersConfig, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = LlamaConfig(**{**tiny_llama.config.to_dict(), "num_hidden_layers": 1})
    torch.manual_seed(0)
    shallow = saved(tmp_path / "shallow", LlamaForCausalLM(config), tiny_tokenizer)
    with pytest.raises(UsageError, match="has one layer, so none can be skipped"):
        replace(stage, model=str(shallow)).run(tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("change", [{"documents": 0}, {"max_tokens": 1}, {"longest": 0}, {"max_evaluations": 0}])
def test_options_out_of_range_are_refused(change: dict[str, Any], stage: SkipLayersConfig) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(change))} is .*; it must be at least"):
        replace(stage, **change)
