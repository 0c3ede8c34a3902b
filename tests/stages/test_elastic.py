"""A stage takes a size of an elastic model by its name: convert, measure, export, generate."""

import json
from pathlib import Path

import pytest
import torch

from potstill.core.errors import UsageError
from potstill.decode.drafters.options import DraftOptions
from potstill.models.elastic import get_sizes
from potstill.models.load import load_model
from potstill.stages.convert import ConvertConfig
from potstill.stages.dry_run_transforms import preview_convert
from potstill.stages.export.export import ExportConfig
from potstill.stages.generate_options import AnswerOptions
from potstill.stages.generate_text import generate_text
from potstill.stages.measure import MeasureConfig

TO = "elastic:shares=1-0.6-0.3"


@pytest.fixture
def elastic(teacher: Path, text: Path, tmp_path: Path) -> Path:
    """A tiny elastic model of 3, 2 and 1 layers."""
    ConvertConfig(model=str(teacher), to=TO, data=str(text), calibration_tokens=256).run(tmp_path / "elastic")
    return tmp_path / "elastic"


def test_the_card_describes_the_sizes(elastic: Path, teacher: Path, text: Path, tmp_path: Path) -> None:
    details = json.loads((elastic / "card.json").read_text())["details"]
    assert [(size["share"], size["layers"]) for size in details["sizes"]] == [(1, 3), (0.6, 2), (0.3, 1)]
    assert details["share"] == 1
    assert details["sizes"][0]["flops_per_token"] == details["flops_per_token"]["before"]
    flops = [size["flops_per_token"] for size in details["sizes"]]
    assert flops == sorted(flops, reverse=True)
    assert [len(layers) for layers in details["layers_of_sizes"].values()] == [3, 2, 1]
    assert "- size 0.3: layers 1, parameters" in (elastic / "README.md").read_text()
    preview = preview_convert(ConvertConfig(model=str(teacher), to=TO, data=str(text)), tmp_path / "out")
    assert preview["sizes"] == details["sizes"]
    whole, original = load_model(elastic).model, load_model(teacher).model.bfloat16()
    assert [size.share for size in get_sizes(whole)] == [1, 0.6, 0.3]
    assert all(torch.equal(w.bfloat16(), original.state_dict()[name]) for name, w in whole.state_dict().items())


def test_a_size_has_the_measures_of_the_model_that_is_exported(elastic: Path, text: Path, tmp_path: Path) -> None:
    size, out = f"{elastic}#0.3", tmp_path / "small"
    ExportConfig(model=size, to="hf").run(out)
    small = load_model(out).model
    assert get_sizes(small) == ()
    assert small.config.num_hidden_layers == 1
    models = (str(elastic), size, str(out))
    measures = MeasureConfig(models=models, data=str(text), documents=4, speed=False, context=128).run()["models"]
    whole, part, exported = ({m["name"]: m["value"] for m in measures[name]} for name in models)
    assert part["bytes"] == whole["bytes"] > exported["bytes"]  # the size is in the file of all sizes
    assert {**part, "bytes": exported["bytes"]} == exported
    assert part["parameters"] < whole["parameters"]
    options = AnswerOptions(max_tokens=4, device="cpu")
    assert generate_text(size, "the still", options)["text"] == generate_text(str(out), "the still", options)["text"]
    drafts = AnswerOptions(max_tokens=4, device="cpu", drafts=DraftOptions(draft=size))
    expected = generate_text(str(elastic), "the still", options)["text"]
    assert generate_text(str(elastic), "the still", drafts)["text"] == expected


def test_an_output_over_its_own_model_and_an_unknown_size_are_refused(elastic: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="would overwrite"):
        ExportConfig(model=f"{elastic}#0.3", to="hf").run(elastic, overwrite=True)
    with pytest.raises(UsageError, match=r"no size 0\.5; choose one of 1, 0\.6, 0\.3"):
        ExportConfig(model=f"{elastic}#0.5", to="hf").run(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UsageError, match="has sizes already"):
        ConvertConfig(model=str(elastic), to=TO).run(tmp_path / "none")
