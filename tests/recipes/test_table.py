"""Every recipe, by enumeration: its tiny form runs, and it says where it comes from."""

import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.pipeline.world import saved
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import NotFound, UsageError
from potstill.pipeline.answers import Answers
from potstill.pipeline.distill import Distill
from potstill.pipeline.prune import Prune
from potstill.pipeline.run import PREVIOUS, Stage, run_stages
from potstill.recipes import table

NAMES = table.names()


@pytest.fixture
def roomy(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny teacher with enough layers and neurons that every share is within reach."""
    changed = {"num_hidden_layers": 16, "intermediate_size": 128, "max_position_embeddings": 512}
    config = LlamaConfig(**{**tiny_llama.config.to_dict(), **changed})
    return saved(tmp_path / "roomy", LlamaForCausalLM(config), tiny_tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_form_runs(name: str, roomy: Path, pairs: Path, tmp_path: Path) -> None:
    chosen = table.recipe(name, tiny=True).having(teacher=str(roomy), data=str(pairs), tokens=256)
    done = run_stages(chosen.stages, tmp_path / "made")
    assert done.measures


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_form_is_the_same_method(name: str) -> None:
    full, tiny = (table.recipe(name, tiny=small) for small in (False, True))
    assert [type(stage) for stage in full.stages] == [type(stage) for stage in tiny.stages]
    for a, b in zip(full.stages, tiny.stages, strict=True):
        assert method(a) == method(b)


def method(stage: Stage) -> Stage:
    """A stage without its budget."""
    if isinstance(stage, Prune):
        return replace(stage, calibration_tokens=1)
    if isinstance(stage, Answers):
        return replace(stage, documents=1)
    budget = {"tokens": 1, "context": 1, "batch_tokens": 1, "micro_tokens": 1}
    return replace(stage, documents=1, settings=replace(stage.settings, **budget))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_where_it_and_its_numbers_come_from(name: str) -> None:
    recipe = table.recipe(name)
    module = importlib.import_module(f"potstill.recipes.{name.replace('-', '_')}")
    assert re.search(r"Source:[^\n]*\n?[^\n]*arXiv:\d{4}\.\d{5}", module.__doc__ or "")
    assert recipe.name == name
    assert re.match(r"@\w+\{\w+,", recipe.bibtex)
    assert re.search(r"arXiv:\d{4}\.\d{5}", recipe.source)
    assert recipe.summary
    assert all(recipe.origins.values())


@pytest.mark.parametrize("name", NAMES)
def test_names_budget_and_seed_can_be_changed(name: str) -> None:
    recipe = table.recipe(name).having(teacher="another", data="other.jsonl", tokens=7, seed=3)
    for stage in recipe.stages:
        assert "smollm2" not in str(stage.to_dict())
        assert stage.data in ("other.jsonl", PREVIOUS)
        if isinstance(stage, Distill):
            assert (stage.settings.tokens, stage.settings.seed) == (7, 3)
    own = table.recipe(name).stages[0].data
    assert table.recipe(name).having(data=own, seed=1) == table.recipe(name)


def test_a_fine_tuned_model_starts_as_its_teacher() -> None:
    (stage,) = table.recipe("sft").having(teacher="another", data="chats.jsonl").stages
    assert isinstance(stage, Distill)
    assert (stage.teacher, stage.student) == ("another", "another")


def test_fine_tuning_without_chats_is_refused() -> None:
    with pytest.raises(UsageError, match="give --data"):
        table.recipe("sft").having(seed=1)


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(NotFound, match=r"dskd-cma.*minima.*vanilla-kd"):
        table.recipe("alchemy")
