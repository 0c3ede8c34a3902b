"""An elastic model keeps its function, and its sizes are nested parts of it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.transforms.small import build, masked_loss, ones, packed

from potstill.core.blueprint import Blueprint
from potstill.core.elastic import Size, read_sizes
from potstill.core.errors import UsageError
from potstill.core.types import Batch
from potstill.models.backbone import Backbone
from potstill.transforms.apply import apply_transform
from potstill.transforms.convert.registry import parse_conversion
from potstill.transforms.convert.to_elastic import compute_dimension_share, round_to_grain
from potstill.transforms.drop_layers import DropLayers
from potstill.transforms.importance import measure_importance, next_token_loss
from potstill.transforms.narrow import Narrow

DIMS = ("depth", "width", "both")


def convert(model: Backbone, batches: list[Batch], dims: str, shares: str = "1-0.6-0.3") -> Backbone:
    return parse_conversion(f"elastic:shares={shares},dims={dims}").convert(model, batches)[0]


@pytest.mark.parametrize("dims", DIMS)
@torch.no_grad()
def test_the_largest_size_is_the_model(dims: str, model: Backbone, batches: list[Batch]) -> None:
    model.double()
    elastic, batch = convert(model, batches, dims), packed(6, 7)
    largest = apply_transform(read_sizes(elastic.blueprint)[0], elastic)
    assert largest.blueprint == model.blueprint
    outputs = [m(batch["input_ids"], batch["position_ids"]) for m in (model, elastic, largest)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-12)
    assert torch.equal(outputs[2], outputs[1])
    assert (elastic.blueprint.layers, elastic.blueprint.hidden) == (model.blueprint.layers, model.blueprint.hidden)


@pytest.mark.parametrize("dims", DIMS)
def test_sizes_are_nested_and_units_sorted_by_importance(dims: str, model: Backbone, batches: list[Batch]) -> None:
    elastic = convert(model, batches, dims)
    for larger, smaller in pairwise(read_sizes(elastic.blueprint)):
        assert set(smaller.layers) <= set(larger.layers)
        assert list(smaller.layers) == sorted(smaller.layers)
        assert all(n <= dict(larger.units)[name] for name, n in smaller.units)
        assert (smaller.layers, smaller.units) != (larger.layers, larger.units)
    if dims != "depth":
        for layers in measure_importance(elastic, batches, next_token_loss).units.values():
            assert all(scores is None or (scores.diff() < 1e-5).all() for scores in layers)


@torch.no_grad()
def test_a_size_is_the_model_with_masks_at_zero(model: Backbone, batches: list[Batch]) -> None:
    elastic, batch = convert(model, batches, "both"), packed(6, 7)
    for size in read_sizes(elastic.blueprint)[1:]:
        network = apply_transform(DropLayers(size.layers), elastic)
        masks = ones(network)
        masks["xi"][:, dict(size.units)["kv_heads"] :] = 0
        masks["nu"][:, dict(size.units)["ffn"] :] = 0
        loss = next_token_loss(apply_transform(size, elastic), batch)
        torch.testing.assert_close(loss, masked_loss(network, batch, masks), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_first_units_are_worth_more_than_the_last(trained: tuple[Backbone, list[Batch], list[Batch]]) -> None:
    model, seen, unseen = trained
    elastic = convert(model, seen, "width", "1-0.5")
    size = read_sizes(elastic.blueprint)[1]
    last = {
        name: tuple(tuple(range(m.cuts()[name].size - n, m.cuts()[name].size)) for m in model.blueprint.layers)
        for name, n in size.units
    }
    losses = [
        sum(next_token_loss(network, batch).item() for batch in unseen)
        for network in (apply_transform(size, elastic), apply_transform(Narrow(units=last), elastic))
    ]
    assert losses[0] < losses[1]


def test_the_share_of_a_dimension_is_that_of_minima() -> None:
    """The table of sparsity to the sparsity of each of two dimensions, which MiniMA's code computes."""
    table = {10: 5, 20: 11, 30: 16, 40: 23, 50: 29, 60: 37, 70: 45, 80: 55, 85: 61, 90: 68, 95: 78, 96: 80, 98: 86}
    assert {s: 100 - round(100 * compute_dimension_share(1 - s / 100, "both")) for s in table} == table
    assert compute_dimension_share(0.3, "depth") == compute_dimension_share(0.3, "width") == 0.3


def test_rows_are_removed_in_eights() -> None:
    rows = {3: 0, 4: 0, 12: 16, 20: 16, 100: 96, 1229: 1232}
    assert {n: round_to_grain(float(n)) for n in rows} == rows


def test_a_pruned_model_has_no_sizes(llama: Backbone, batches: list[Batch]) -> None:
    elastic = convert(llama, batches, "depth")
    assert len(read_sizes(elastic.blueprint)) == 3
    assert read_sizes(DropLayers((0, 1)).blueprint(elastic.blueprint)) == ()
    wide = convert(llama, batches, "width")
    assert read_sizes(Narrow(units={"ffn": ((0, 1, 2),) * 3}).blueprint(wide.blueprint)) == ()


def test_sizes_survive_json(llama: Backbone, batches: list[Batch]) -> None:
    blueprint = convert(llama, batches, "both").blueprint
    assert Blueprint.from_dict(blueprint.to_dict()) == blueprint
    assert read_sizes(Blueprint.from_dict(blueprint.to_dict())) == read_sizes(blueprint)


def test_what_cannot_be_elastic_is_refused(llama: Backbone, batches: list[Batch]) -> None:
    to_elastic = parse_conversion("elastic")
    with pytest.raises(UsageError, match=r"the shares 0\.75 and 0\.5 give one size of this model"):
        to_elastic.blueprint(llama.blueprint)
    with pytest.raises(UsageError, match="has sizes already"):
        to_elastic.blueprint(convert(llama, batches, "depth").blueprint)
    uneven = replace(llama.blueprint.layers[0], ffn=replace(llama.blueprint.layers[0].ffn, width=40))
    blueprint = replace(llama.blueprint, layers=(*llama.blueprint.layers, uneven))
    with pytest.raises(UsageError, match="ffn of several widths"):
        parse_conversion("elastic:dims=width").blueprint(blueprint)
    for options, message in (
        ("shares=0.5-0.25", "must begin with 1"),
        ("shares=1", "at least two"),
        ("shares=1-0.25-0.5", "go down"),
        ("shares=1-half", "no list of shares"),
        ("dims=length", "choose one of depth, width, both"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_conversion(f"elastic:{options}")


def test_a_size_is_named_by_its_share() -> None:
    assert Size(0.5, (0,)).to_dict() == {"share": 0.5, "layers": [0], "units": {}}
    assert build("llama tied").blueprint.get_extra("potstill_sizes") is None
