"""Convert leaves a folder with the converted model, and its card says what changed."""

import json
from pathlib import Path

import pytest

from potstill.core.errors import DataError, UsageError
from potstill.models.load import load_model
from potstill.stages.convert import ConvertConfig
from potstill.stages.dry_run_transforms import preview_convert


def test_the_folder_is_a_model_with_its_card(teacher: Path, tmp_path: Path) -> None:
    config = ConvertConfig(model=str(teacher), to="longer:factor=4,method=linear")
    preview = preview_convert(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    card = config.run(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "card.json").read_text())
    assert written["details"]["conversion"] == {"name": "longer", "factor": 4.0, "method": "linear", "theta": None}
    assert (
        written["details"]["context"]
        == preview["context"]
        == 4 * load_model(teacher).model.config.max_position_embeddings
    )
    states = written["details"]["state_bytes"]
    assert states["before"] == states["after"] == card.details["state_bytes"]["after"]
    assert written["details"]["state_bytes_per_token"] == {"before": 192, "after": 192}
    assert written["stage"] == config.to_dict()
    assert "converted to longer" in (tmp_path / "out" / "README.md").read_text()
    model = load_model(tmp_path / "out").model
    assert model.config.rope_parameters["factor"] == 4.0


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("longr", "did you mean 'longer'"),
        ("longer:facter=2", "did you mean 'factor'"),
        ("longer:factor=much", "factor=much is not a number"),
        ("longer:factor", "needs factor=VALUE"),
        ("longer:factor=1", "above 1"),
        ("longer:factor=nan", "above 1"),
        ("longer:method=rope", "choose one of yarn"),
        ("longer:method=ntk,theta=1e6", "theta belongs to method=base"),
    ],
)
def test_a_wrong_conversion_is_refused_in_one_sentence(to: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ConvertConfig(model="smollm2", to=to)


def test_a_model_is_not_converted_twice(teacher: Path, tmp_path: Path) -> None:
    ConvertConfig(model=str(teacher), to="longer").run(tmp_path / "once")
    with pytest.raises(UsageError, match="scaled already"):
        ConvertConfig(model=str(tmp_path / "once"), to="longer").run(tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_experts_follow_the_languages_of_the_data(teacher: Path, tmp_path: Path) -> None:
    words = {"en": "the still boils", "de": "die Blase kocht", "fr": "l'alambic bout"}
    rows = [{"text": f"{text} {i} times", "lang": name} for i in range(30) for name, text in words.items()]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ConvertConfig(
        model=str(teacher), to="layermoe:old=en,column=lang,budget=9", data=str(data), calibration_tokens=2048
    )
    card = config.run(tmp_path / "out")
    counts = card.details["experts"]
    model = load_model(tmp_path / "out").model
    assert [layer.ffn.count for layer in model.backbone.blueprint.layers] == counts
    assert card.details["parameters"] == sum(weight.numel() for weight in model.parameters())
    with pytest.raises(DataError, match="has no column `language`"):
        ConvertConfig(model=str(teacher), to="layermoe:old=en", data=str(data)).run(tmp_path / "again")
    with pytest.raises(UsageError, match="has no column 'language'"):
        ConvertConfig(model=str(teacher), to="layermoe:old=en").run(tmp_path / "again")
