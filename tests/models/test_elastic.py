"""A size of an elastic model is a stock model whose weights are views of the model's."""

import json
from pathlib import Path

import pytest
import torch
from tests.stages.world import saved
from tests.transforms.small import KINDS, build, packed
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import potstill
from potstill.core.errors import ArtifactError, UsageError
from potstill.models.elastic import SizeView, copy_size, get_sizes, slice_model
from potstill.models.families.registry import export_model, import_model, read_weights
from potstill.models.load import load_model
from potstill.models.locate import split_size
from potstill.models.spec import read_model_spec
from potstill.stages.export.export import ExportConfig
from potstill.transforms.apply import apply_transform
from potstill.transforms.convert.registry import parse_conversion

IDS = torch.arange(1, 9)[None]


def elastic(kind: str, dims: str = "both") -> PreTrainedModel:
    torch.manual_seed(0)
    to_elastic = parse_conversion(f"elastic:shares=1-0.6-0.3,dims={dims}")
    return export_model(to_elastic.convert(build(kind, layers=4), [packed(9, 8)])[0])


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One elastic model of each kind."""
    return elastic(request.param)


@torch.no_grad()
def test_a_size_is_the_exported_model_to_the_bit(model: PreTrainedModel, tmp_path: Path) -> None:
    for size in get_sizes(model):
        view, copied = slice_model(model, size.share), copy_size(model, size.share)
        exported = export_model(apply_transform(size, import_model(model)))
        assert type(view) is type(copied) is type(exported)
        assert view.config.to_diff_dict() == exported.config.to_diff_dict()
        assert get_sizes(view) == ()
        expected = exported(IDS).logits
        assert torch.equal(view(IDS).logits, expected)
        assert torch.equal(copied(IDS).logits, expected)
        copied.save_pretrained(tmp_path / f"{size.share}")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / f"{size.share}")(IDS).logits, expected)
        addresses = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        assert {weight.untyped_storage().data_ptr() for weight in view.parameters()} <= addresses
        assert not {weight.untyped_storage().data_ptr() for weight in copied.parameters()} & addresses


def test_gradients_reach_the_first_units_alone(model: PreTrainedModel) -> None:
    size = get_sizes(model)[2]
    copied = copy_size(model, size.share)
    for network in (copied, slice_model(model, size.share)):
        network(IDS).logits.double().pow(2).sum().backward()
    blueprint, weights = read_weights(model)
    gradients = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}
    parts, expected = size.weights(gradients, blueprint), read_weights(copied)[1]
    assert parts.keys() == expected.keys()
    for name, gradient in parts.items():
        torch.testing.assert_close(gradient, expected[name].grad)
        gradient.zero_()
    assert all(not gradient.any() for gradient in gradients.values())


@torch.no_grad()
def test_a_view_follows_the_weights(model: PreTrainedModel) -> None:
    size = get_sizes(model)[1]
    view = SizeView(model, size)
    before = view.update()(IDS).logits
    for weight in model.parameters():
        weight.mul_(1.1)
    after = view.model(IDS).logits
    assert not torch.equal(before, after)
    assert torch.equal(after, copy_size(model, size.share)(IDS).logits)
    model.to(torch.bfloat16)
    assert torch.equal(view.update()(IDS).logits, copy_size(model, size.share)(IDS).logits)


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with an elastic model."""
    return saved(tmp_path / "elastic", elastic("llama tied", "depth"), tiny_tokenizer)  # type: ignore[arg-type]


def test_a_folder_opens_as_the_largest_size_and_by_name_as_each(folder: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).potstill_sizes[1]["share"] == 0.6
    whole = load_model(folder)
    assert [size.share for size in get_sizes(whole.model)] == [1, 0.6, 0.3]
    assert torch.equal(whole.model(IDS).logits, stock(IDS).logits)
    small = load_model(f"{folder}#0.3")
    assert torch.equal(small.model(IDS).logits, slice_model(whole.model, 0.3)(IDS).logits)
    assert (small.name, small.note) == (f"{folder}#0.3", "the size 0.3")
    assert small.digest != whole.digest
    assert read_model_spec(f"{folder}#0.3").blueprint == import_model(small.model).blueprint
    assert torch.equal(potstill.load(folder, size=0.3).model(IDS).logits, small.model(IDS).logits)
    assert split_size("owner/name@main#0.5") == ("owner/name@main", 0.5)
    assert split_size("http://localhost:8000/v1#0.5").share is None


def test_a_size_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"elastic has no size 0\.5; choose one of 1, 0\.6, 0\.3"):
        load_model(f"{folder}#0.5")
    with pytest.raises(UsageError, match="-1 is no size of a model"):
        potstill.load(folder, size=-1.0)
    assert ExportConfig(model=str(folder), to="hf", size=0.3).model == f"{folder}#0.3"
    with pytest.raises(UsageError, match=r"no size 0\.5"):
        read_model_spec(f"{folder}#0.5")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "potstill_sizes": 3}))
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_model(f"{folder}#0.6")
    (folder / "config.json").write_text(json.dumps({**config, "potstill_sizes": []}))
    with pytest.raises(UsageError, match="has one size alone"):
        load_model(f"{folder}#0.6")
