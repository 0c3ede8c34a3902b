"""Prune leaves a stock folder that says where it came from."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from tests.layers.extensions.gated_delta import GatedDelta
from transformers import AutoModelForCausalLM

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.errors import InfeasibleTarget, UnsupportedModel, UsageError
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone
from potstill.models.load import compute_digest
from potstill.stages.prune import PruneConfig


@pytest.fixture
def stage(teacher: Path, text: Path) -> PruneConfig:
    return PruneConfig(model=str(teacher), data=str(text), keep=0.755, calibration_tokens=256)


def test_the_folder_is_a_stock_model_with_its_card(stage: PruneConfig, teacher: Path, tmp_path: Path) -> None:
    card = stage.run(tmp_path / "made")
    assert {file.name for file in (tmp_path / "made").iterdir()} == {
        *("README.md", "card.json", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert not list(tmp_path.glob(".made*"))
    written = json.loads((tmp_path / "made" / "card.json").read_text())
    assert written == json.loads(json.dumps(card.to_dict()))
    (parent,) = written["parents"]
    assert (parent["name"], parent["licence"], parent["digest"]) == (
        str(teacher),
        "apache-2.0",
        compute_digest(teacher),
    )
    assert written["stage"] == stage.to_dict()
    assert written["details"]["shape"]["layers"] == 2
    assert written["data"]["calibrated_on"] == stage.data
    assert written["versions"]["torch"] == version("torch")


def test_transformers_alone_opens_the_folder(stage: PruneConfig, tmp_path: Path) -> None:
    card = stage.run(tmp_path / "made")
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'made')!r})\n"
        f"AutoTokenizer.from_pretrained({str(tmp_path / 'made')!r})\n"
        "print(type(model).__name__, model.num_parameters(), 'potstill' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["LlamaForCausalLM", str(card.details["parameters"]), "False"], done.stderr


def test_the_readme_tells_a_stranger_what_it_is(stage: PruneConfig, teacher: Path, tmp_path: Path) -> None:
    stage.run(tmp_path / "made")
    text = (tmp_path / "made" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert body.lstrip().startswith("# made")
    for fact in (
        "`teacher` pruned to 75.5% of its parameters",
        "license: apache-2.0",
        "- layers: 2",
        "equal within",
    ):
        assert fact in body
    assert "None" not in body
    assert str(teacher.parent) not in body


@pytest.mark.parametrize("layers_by", ["harm", "evenly"])
def test_whole_layers_that_stay_are_the_teachers(teacher: Path, text: Path, tmp_path: Path, layers_by: str) -> None:
    stage = PruneConfig(
        model=str(teacher),
        data=str(text),
        shape={"layers": 2},
        layers_by=layers_by,
        calibration_tokens=256,
        save_dtype="float32",
    )
    kept = stage.run(tmp_path / "made").details["kept_layers"]
    old, new = (AutoModelForCausalLM.from_pretrained(f).model.layers for f in (teacher, tmp_path / "made"))
    assert len(new) == 2
    for place, number in enumerate(kept):
        assert torch.equal(new[place].mlp.up_proj.weight, old[number].mlp.up_proj.weight)


def test_an_interruption_leaves_nothing(stage: PruneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("potstill.stages.saved_model.compute_reload_gap", stop)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        stage.run(tmp_path / "deep" / "made")
    assert set(tmp_path.rglob("*")) == before


def test_what_is_overwritten_stays_until_the_new_one_is_whole(
    stage: PruneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.run(tmp_path / "made")
    before = compute_digest(tmp_path / "made")
    with monkeypatch.context() as patch:
        patch.setattr("potstill.stages.transform.write_card", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.run(tmp_path / "made", overwrite=True)
    assert compute_digest(tmp_path / "made") == before
    assert not list(tmp_path.glob(".made*"))


@pytest.mark.parametrize("options", [{}, {"keep": 0.5, "params": 9}, {"keep": 0.5, "strategy": "x"}, {"params": 0}])
def test_a_stage_that_means_nothing_cannot_be_made(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        PruneConfig(model="m", **options)  # type: ignore[arg-type]


def test_a_size_that_cannot_be_reached_names_the_nearest(teacher: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InfeasibleTarget, match=r"--keep 0\.755"):
        PruneConfig(model=str(teacher), data=str(text), keep=0.7).run(tmp_path / "made")


def test_a_hybrid_stack_is_refused_before_anything_is_measured() -> None:
    layer = Layer(Attention(2, 1, 4), SwiGLU(8))
    hybrid = Backbone(Blueprint(30, 8, (layer, replace(layer, mixer=GatedDelta(2, 4))), context=64))
    with pytest.raises(UnsupportedModel, match="layers are of 2 kinds"):
        PruneConfig(model="hybrid", keep=0.5).compute_target_shape(hybrid)
