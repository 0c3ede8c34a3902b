"""Dropping a layer is skipping it; the layers that go are the ones that do least harm."""

import json
from itertools import combinations, pairwise

import pytest
import torch
from tests.transforms.small import build, digest, packed
from torch import Tensor

from potstill.core.errors import DataError, UsageError
from potstill.core.types import Batch
from potstill.models.backbone import Backbone
from potstill.transforms.apply import apply_transform
from potstill.transforms.drop_layers import DropLayers, ablate_layers, select_evenly, select_highest
from potstill.transforms.importance import next_token_loss


@torch.no_grad()
def mean_loss(model: Backbone, batches: list[Batch]) -> float:
    return sum(next_token_loss(model, batch).item() for batch in batches) / len(batches)


@torch.no_grad()
def test_dropping_layers_is_skipping_them(model: Backbone) -> None:
    batch = packed(6, 7)
    new = apply_transform(DropLayers((0, 2)), model)
    handle = model.layers[1].register_forward_hook(lambda _, inputs, output: (inputs[0], output[1]))
    skipped = model(batch["input_ids"], batch["position_ids"])
    handle.remove()
    assert torch.equal(new(batch["input_ids"], batch["position_ids"]), skipped)
    assert not torch.equal(model(batch["input_ids"], batch["position_ids"]), skipped)


def test_layers_are_numbered_without_gaps_and_keep_their_own_widths(llama: Backbone) -> None:
    mixed = build("llama tied", layers=12)
    new = apply_transform(DropLayers((1, 10, 11)), mixed)
    assert len(new.blueprint.layers) == 3
    assert torch.equal(new.layers[1].ffn.up.weight, mixed.layers[10].ffn.up.weight)
    assert torch.equal(new.layers[2].ffn.up.weight, mixed.layers[11].ffn.up.weight)
    assert {name.split(".")[1] for name in new.state_dict() if name.startswith("layers")} == {"0", "1", "2"}


def test_keeping_every_layer_is_the_same_model(llama: Backbone) -> None:
    new = apply_transform(DropLayers((0, 1, 2)), llama)
    assert new.blueprint == llama.blueprint
    assert digest(new) == digest(llama)


def test_layers_dropped_one_after_the_other_are_layers_dropped_at_once() -> None:
    model = build("llama tied", layers=6)
    once = apply_transform(DropLayers((0, 3, 5)), model)
    twice = apply_transform(DropLayers((0, 2, 3)), apply_transform(DropLayers((0, 1, 3, 5)), model))
    assert digest(once) == digest(twice)


@pytest.mark.parametrize("keep", [(), (1, 0), (1, 1), (-1, 2)])
def test_a_list_of_layers_that_means_nothing_is_refused(keep: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="at least one, ascending, each named once"):
        DropLayers(keep)


def test_a_layer_that_is_not_there_is_refused(llama: Backbone) -> None:
    with pytest.raises(UsageError, match="layer 3 does not exist; the model's layers are 0 to 2"):
        apply_transform(DropLayers((0, 3)), llama)


@pytest.mark.parametrize("layers", range(1, 34))
def test_evenly_keeps_the_right_number_with_both_ends_and_is_symmetric(layers: int) -> None:
    for keep in range(1, layers + 1):
        kept = select_evenly(layers, keep)
        assert len(set(kept)) == keep
        assert list(kept) == sorted(kept)
        mirrored = sorted(layers - 1 - i for i in kept)
        off = 1 if layers % 2 == 0 and keep % 2 else 0  # an even stack has no middle layer to keep
        assert len(set(kept) ^ set(mirrored)) == 2 * off
        if keep > 1:
            assert (kept[0], kept[-1]) == (0, layers - 1)
            gaps = [b - a for a, b in pairwise(kept)]
            assert max(gaps) - min(gaps) <= 2


def test_evenly_by_hand() -> None:
    assert select_evenly(7, 4) == (0, 2, 4, 6)
    assert select_evenly(5, 1) == (2,)
    assert select_evenly(10, 4) == (0, 3, 6, 9)
    assert select_evenly(10, 6, protect_first=2, protect_last=2) == (0, 1, 2, 7, 8, 9)
    assert select_evenly(30, 19, protect_first=8)[:9] == (0, 1, 2, 3, 4, 5, 6, 7, 8)
    assert select_evenly(6, 4, protect_first=2, protect_last=2) == (0, 1, 4, 5)


def test_highest_keeps_the_highest_scores_and_the_protected_ends() -> None:
    scores = [0.1, 0.5, 0.2, 0.9, 0.2]
    assert select_highest(scores, 2) == (1, 3)
    assert select_highest(scores, 3) == (1, 2, 3)  # a tie keeps the earlier
    assert select_highest(scores, 3, protect_first=1, protect_last=1) == (0, 3, 4)
    assert select_highest(torch.tensor(scores).tolist(), 5) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(("keep", "first"), [(0, 0), (6, 0), (2, 3)])
def test_numbers_of_layers_that_cannot_be_kept_are_refused(keep: int, first: int) -> None:
    for choose in (
        lambda: select_evenly(5, keep, protect_first=first),
        lambda: select_highest([0.0] * 5, keep, protect_first=first),
    ):
        with pytest.raises(UsageError, match="cannot"):
            choose()


def test_harm_alone_is_the_rise_of_the_loss_without_that_layer(model: Backbone, batches: list[Batch]) -> None:
    harm = ablate_layers(model, batches, next_token_loss, 3)
    assert harm.loss == pytest.approx(mean_loss(model, batches), rel=1e-6)
    for i in range(3):
        without = apply_transform(DropLayers(tuple(j for j in range(3) if j != i)), model)
        assert harm.alone[i] == pytest.approx(mean_loss(without, batches) - harm.loss, abs=1e-5)
    assert harm.keep == (0, 1, 2)
    assert harm.order == harm.after == ()


def test_greedy_takes_the_least_harmful_layer_each_time(batches: list[Batch]) -> None:
    model = build("llama tied", layers=5)
    harm = ablate_layers(model, batches, next_token_loss, 1)
    left = list(range(5))
    for gone, after in zip(harm.order, harm.after, strict=True):
        losses = {
            i: mean_loss(apply_transform(DropLayers(tuple(j for j in left if j != i)), model), batches) for i in left
        }
        assert losses[gone] == pytest.approx(min(losses.values()), abs=1e-5)
        left.remove(gone)
        assert after == pytest.approx(losses[gone], abs=1e-5)
    assert harm.keep == tuple(left)


def test_one_measurement_ranks_by_the_harm_alone(batches: list[Batch]) -> None:
    model = build("llama tied", layers=5)
    harm = ablate_layers(model, batches, next_token_loss, 2, greedy=False)
    assert harm.keep == select_highest(harm.alone, 2)
    assert list(harm.order) == sorted(harm.order, key=lambda i: harm.alone[i])
    assert harm.after[-1] == pytest.approx(mean_loss(apply_transform(DropLayers(harm.keep), model), batches), abs=1e-5)


@pytest.mark.parametrize("greedy", [True, False])
def test_a_planted_useless_layer_is_found(greedy: bool, batches: list[Batch]) -> None:
    for useless in range(4):
        model = build("qwen3 tied", layers=4)
        with torch.no_grad():
            model.layers[useless].mixer.o.weight.zero_()
            model.layers[useless].ffn.down.weight.zero_()
        model.requires_grad_(False)
        harm = ablate_layers(model, batches, next_token_loss, 3, greedy=greedy)
        assert harm.alone[useless] == pytest.approx(0, abs=1e-6)
        if min(h for i, h in enumerate(harm.alone) if i != useless) > 0:  # a random layer may do harm by staying
            assert harm.order == (useless,)


def test_greedy_is_no_worse_than_one_measurement_on_a_backup_pair(batches: list[Batch]) -> None:
    """Over all pairs of layers, the greedy choice ranks no lower than the choice by one measurement."""
    model = build("llama tied", layers=5)
    losses = {keep: mean_loss(apply_transform(DropLayers(keep), model), batches) for keep in combinations(range(5), 3)}
    greedy, once = (ablate_layers(model, batches, next_token_loss, 3, greedy=g).keep for g in (True, False))
    assert losses[greedy] <= losses[once]


def test_measuring_harm_changes_nothing(llama: Backbone, batches: list[Batch]) -> None:
    llama.train()
    before, parts, blueprint = digest(llama), dict(llama.named_modules()), llama.blueprint
    ablate_layers(llama, batches, next_token_loss, 1)
    assert digest(llama) == before
    assert dict(llama.named_modules()) == parts
    assert llama.blueprint == blueprint
    assert all(module.training for module in llama.modules())
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_layers_below_the_skipped_one_are_not_run_again(batches: list[Batch]) -> None:
    model = build("llama tied", layers=6)
    runs: list[int] = []
    for i, block in enumerate(model.layers):
        block.register_forward_hook(lambda *_, i=i: runs.append(i))
    ablate_layers(model, batches[:1], next_token_loss, 6)
    assert sorted(runs) == [i for i in range(6) for _ in range(i + 1)]


def test_the_loss_is_measured_on_the_very_network_that_is_left(llama: Backbone, batches: list[Batch]) -> None:
    seen: list[int] = []

    def counting(model: Backbone, batch: Batch) -> Tensor:
        seen.append(len(model.layers))
        assert model.head().weight is llama.embed.weight
        return next_token_loss(model, batch)

    ablate_layers(llama, batches[:1], counting, 2)
    assert seen == [3, 2, 1, 0, 2]  # the whole, what lies above each layer, what is left


def test_harm_needs_text_and_a_finite_loss(llama: Backbone, batches: list[Batch]) -> None:
    with pytest.raises(DataError, match="no calibration batches"):
        ablate_layers(llama, [], next_token_loss, 2)
    with torch.no_grad():
        llama.norm.weight[0] = torch.nan
    with pytest.raises(DataError, match="the loss of 3 layers is nan"):
        ablate_layers(llama, batches, next_token_loss, 2)
    with pytest.raises(UsageError, match="cannot keep 4 of 3 layers"):
        ablate_layers(llama, batches, next_token_loss, 4)


def test_the_card_holds_the_measured_numbers(llama: Backbone, batches: list[Batch]) -> None:
    harm = ablate_layers(llama, batches, next_token_loss, 1)
    card = json.loads(json.dumps(harm.to_dict()))
    assert card["keep"] == list(harm.keep)
    assert card["alone"] == list(harm.alone)
    assert len(card["order"]) == len(card["after"]) == 2
