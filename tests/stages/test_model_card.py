"""A card that a hub reads: its front matter, its snippet, and no folder of the machine that made it."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.card import Card, Parent
from potstill.core.measure_table import MEASURES
from potstill.models.lineage import find_hub_id, read_languages
from potstill.models.saving import save_model_folder
from potstill.stages.model_card import write_card
from potstill.stages.public_names import get_public_name, hide_folders

HOME = "/home/someone/work"
PARENT = Parent(
    role="teacher, which it was pruned from",
    name=f"{HOME}/big",
    digest="0",
    licence="apache-2.0",
    hub_id="org/big",
    languages=("en",),
)
CARD = Card(
    stage={"stage": "prune", "data": f"{HOME}/data"},
    seed=1,
    parents=[PARENT],
    data={
        "calibrated_on": "owner/texts",
        "provenance": {"source": "hub: owner/texts:en", "revision": "abc"},
        "measured_on": f"{HOME}/held out.jsonl (all), 20 documents",
        "split": "train",
        "licence": "mit",
        "documents": 9,
        "tokens": 9,
        "trained_share": 1.0,
        "text_digest": "0",
    },
    measures={
        "teacher": [MEASURES["bits_per_byte"].build(1.0, 20)],
        "made": [
            MEASURES["bits_per_byte"].build(1.25, 20, low=1.2, high=1.3),
            MEASURES["teacher_kl"].build(float("nan"), 20),
            MEASURES["parameters"].build(9.0, 1),
        ],
    },
    failures={"samples": f"OSError: {HOME}/made is gone"},
    command=f"potstill prune '{HOME}/My Models/big' --data ~/data --out {HOME}/made --keep 0.5",
)


DRAFT = replace(
    CARD,
    stage={
        "stage": "distill",
        "teacher": "org/big",
        "on_policy": 0.0,
        "rollout": "gkd",
        "objective": {"name": "acceptance_nll", "cross_entropy": 0.0, "temperature": 1.0, "options": {}},
    },
    measures={
        "teacher": [MEASURES["acceptance"].build(1.0, 20)],
        "before training": [MEASURES["acceptance"].build(0.1, 20)],
        "a folder": [MEASURES["acceptance"].build(0.625, 20, low=0.6, high=0.65)],
    },
)


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    save_model_folder(tiny_llama, tiny_tokenizer, tmp_path / "made")
    return tmp_path / "made"


def test_a_hub_parses_the_front_matter_and_its_results(folder: Path) -> None:
    write_card(folder, CARD, title="made")
    data = ModelCard.load(folder / "README.md").data
    facts = data.to_dict()
    assert {name: facts[name] for name in ("base_model", "base_model_relation", "datasets", "language", "license")} == {
        "base_model": "org/big",
        "base_model_relation": "finetune",
        "datasets": ["owner/texts"],
        "language": ["en"],
        "license": "apache-2.0",
    }
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", "made")
    (result,) = data.eval_results or []
    assert (result.metric_type, result.metric_value) == ("bits_per_byte", 1.25)
    assert (result.dataset_type, result.dataset_name) == ("owner/texts", "held out.jsonl")


def test_a_mixture_names_its_hub_data_for_the_hub_and_all_its_parts_for_people(folder: Path) -> None:
    sources = [
        {"source": "hub: owner/texts@main:en", "revision": "abc", "weight": 0.7, "documents": 1234},
        {"source": f"{HOME}/own texts.jsonl", "weight": 0.3, "documents": 5},
    ]
    name = f"owner/texts@main:en + {HOME}/own texts.jsonl"
    data = {**CARD.data, "calibrated_on": name, "measured_on": f"{name} (validation), 20 documents"}
    write_card(folder, replace(CARD, data={**data, "provenance": {"sources": sources}}), title="made")
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["datasets"] == ["owner/texts"]
    validate_repo_id(card.data.to_dict()["datasets"][0])
    (result,) = card.data.eval_results or []
    assert (result.dataset_type, result.dataset_name) == ("owner/texts@main:en + own texts.jsonl",) * 2
    parts = "`owner/texts@main:en` (1,234 documents, weight 0.7, revision abc); `own texts.jsonl` (5 documents, weight"
    assert f"- data sets: {parts} 0.3)\n" in card.text
    assert "- calibrated on: owner/texts@main:en + own texts.jsonl (train), license: mit\n" in card.text
    assert "Measured on owner/texts@main:en + own texts.jsonl (validation), 20 documents, with" in card.text
    assert "someone" not in card.content


@pytest.mark.parametrize("has_template", [True, False])
def test_the_snippet_generates(
    has_template: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not has_template:
        (folder / "chat_template.jinja").unlink()
    write_card(folder, CARD, title="made")
    text = (folder / "README.md").read_text()
    assert ("apply_chat_template" in text) == has_template
    assert "Needs transformers 4.57 or newer. The weights are saved in float32." in text
    monkeypatch.chdir(folder.parent)
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out


def test_no_folder_of_the_machine_is_in_the_readme(folder: Path) -> None:
    write_card(folder, CARD, title="made")
    text = (folder / "README.md").read_text()
    assert "someone" not in text
    assert "potstill prune 'big' --data data --out made --keep 0.5" in text
    assert "OSError: made is gone" in text


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/a/b/model", "model"),
        ("~/model.gguf", "model.gguf"),
        ("own=/a/b", "own=b"),
        ("C:\\models\\big", "big"),
        ("org/model", "org/model"),
        ("http://host:80/v1#m", "http://host:80/v1#m"),
        ("http://host:80/v1#/a/b/m", "http://host:80/v1#m"),
        ("stdlib", "stdlib"),
        ("", ""),
    ],
)
def test_of_a_path_the_last_part_is_public(place: str, name: str) -> None:
    assert get_public_name(place) == name


def test_text_without_paths_stays() -> None:
    text = "12 tokens/s, and/or bits / byte </think> at http://host/v1 in 1/2 of org/model"
    assert hide_folders(text) == text


def test_the_hub_id_of_a_student_is_that_of_the_model_it_was_made_from(folder: Path) -> None:
    assert find_hub_id("smollm2", Path("x.gguf")) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert find_hub_id("org/big", folder) == "org/big"
    assert find_hub_id(str(folder), folder) == ""
    write_card(folder, CARD, title="made")
    assert find_hub_id(str(folder), folder) == "org/big"
    assert read_languages(str(folder), folder) == ("en",)
    write_card(folder, replace(CARD, parents=[replace(PARENT, hub_id="", languages=())]), title="made")
    assert find_hub_id(str(folder), folder) == ""


def test_the_card_of_a_draft_names_its_target_and_the_acceptance(folder: Path) -> None:
    write_card(folder, DRAFT, title="made")
    text = (folder / "README.md").read_text()
    assert "potstill generate org/big --draft made" in text
    assert "`org/big` accepts a drafted token with the probability 0.625 [0.600, 0.650]" in text
    plain = {**DRAFT.stage, "objective": {**DRAFT.stage["objective"], "name": "forward_kl"}}
    write_card(folder, replace(DRAFT, stage=plain), title="made")
    assert "--draft" not in (folder / "README.md").read_text()
