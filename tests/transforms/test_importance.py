"""Importance is the gradient of masks that are never built."""

import pytest
import torch
from tests.transforms.small import build, digest, masked_loss, ones, packed
from torch import Tensor

from potstill.core.errors import DataError
from potstill.core.types import Batch
from potstill.models.backbone import Backbone
from potstill.transforms.importance import ImportanceScores, measure_importance, next_token_loss

STEP = 1e-5


def slopes(model: Backbone, batches: list[Batch], mask: str) -> Tensor:
    """Mean over batches of |dL/dmask|, by central differences."""
    total = torch.zeros_like(ones(model)[mask])
    for batch in batches:
        for unit in range(total.numel()):
            up, down = ones(model), ones(model)
            up[mask].view(-1)[unit] += STEP
            down[mask].view(-1)[unit] -= STEP
            change = masked_loss(model, batch, up) - masked_loss(model, batch, down)
            total.view(-1)[unit] += abs(change.item()) / (2 * STEP)
    return total / len(batches)


def unit(scores: Tensor) -> Tensor:
    return scores / scores.norm(dim=-1, keepdim=True)


def assert_equal(a: ImportanceScores, b: ImportanceScores) -> None:
    assert a.units.keys() == b.units.keys()
    pairs = [pair for name, scores in a.units.items() for pair in zip(scores, b.units[name], strict=True)]
    for mine, theirs in (*pairs, (a.hidden, b.hidden)):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("kind", "close"), [("llama with every bias", 1e-4), ("gemma3", 2e-2)])
@torch.no_grad()
def test_importance_is_the_finite_difference_of_its_masks(kind: str, close: float) -> None:
    model, batches = build(kind, layers=2, hidden=6), [packed(5, 4), packed(6)]
    found = measure_importance(model, batches, next_token_loss)
    # the network's norms are float32 inside, the definition's are not, but for those of queries and keys: 1e-7 of noise
    # over a step of 1e-5
    tolerance = {"rtol": close, "atol": close / 10}
    torch.testing.assert_close(torch.stack(found.units["kv_heads"]), unit(slopes(model, batches, "xi")), **tolerance)
    torch.testing.assert_close(torch.stack(found.units["ffn"]), unit(slopes(model, batches, "nu")), **tolerance)
    torch.testing.assert_close(found.hidden, unit(slopes(model, batches, "eta")), **tolerance)
    loss = sum(masked_loss(model, batch, ones(model)).item() for batch in batches) / 2
    assert found.loss == pytest.approx(loss, rel=1e-5)


def test_a_head_or_neuron_that_is_not_heard_has_importance_zero(llama: Backbone, batches: list[Batch]) -> None:
    with torch.no_grad():
        llama.layers[1].mixer.o.weight[:, 8:16] = 0  # the second key/value head has two queries of 4
        llama.layers[2].ffn.down.weight[:, 7] = 0
    found = measure_importance(llama, batches, next_token_loss)
    assert found.units["kv_heads"][1][1] == 0
    assert found.units["kv_heads"][1][[0, 2]].min() > 0
    assert found.units["ffn"][2][7] == 0
    assert found.units["ffn"][1][7] > 0


def test_a_layer_in_which_nothing_matters_scores_zero_instead_of_nan(llama: Backbone, batches: list[Batch]) -> None:
    with torch.no_grad():
        llama.layers[1].mixer.o.weight.zero_()
    assert measure_importance(llama, batches, next_token_loss).units["kv_heads"][1].tolist() == [0, 0, 0]


def test_measuring_changes_nothing(llama: Backbone, batches: list[Batch]) -> None:
    llama.train()
    llama.layers[0].eval()  # modes may differ inside a model
    llama.embed.weight.requires_grad_(False)
    before, modes = digest(llama), [module.training for module in llama.modules()]
    measure_importance(llama, batches, next_token_loss)
    assert digest(llama) == before
    assert [module.training for module in llama.modules()] == modes
    assert all(weight.grad is None for weight in llama.parameters())
    assert [weight.requires_grad for weight in llama.parameters()].count(False) == 1
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in llama.modules())


def test_hooks_and_modes_are_put_back_after_an_error(llama: Backbone, batches: list[Batch]) -> None:
    def failing(model: Backbone, batch: Batch) -> Tensor:
        raise KeyError("planted")

    llama.train()
    with pytest.raises(KeyError, match="planted"):
        measure_importance(llama, batches, failing)
    assert llama.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in llama.modules())


def test_a_frozen_model_under_no_grad_is_measured_all_the_same(llama: Backbone, batches: list[Batch]) -> None:
    free = measure_importance(llama, batches, next_token_loss)
    with torch.no_grad():
        assert_equal(measure_importance(llama.requires_grad_(False), batches, next_token_loss), free)


def test_the_absolute_value_is_taken_of_each_batch_and_then_averaged(llama: Backbone, batches: list[Batch]) -> None:
    both = measure_importance(llama, batches, next_token_loss)
    repeated = measure_importance(llama, batches + batches, next_token_loss)
    assert_equal(both, repeated)
    assert (repeated.batches, repeated.tokens) == (4, 50)
    opposite = [batches[0], {**batches[0], "sign": torch.tensor(-1.0)}]
    signed = measure_importance(llama, opposite, lambda m, b: next_token_loss(m, b) * b.get("sign", torch.tensor(1.0)))
    assert_equal(signed, measure_importance(llama, batches[:1], next_token_loss))  # else they would cancel to 0


def test_autocast_ranks_as_float32_does(trained: tuple[Backbone, list[Batch], list[Batch]]) -> None:
    model, seen, _ = trained
    plain = measure_importance(model, seen[:2], next_token_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = measure_importance(model, seen[:2], next_token_loss)
    assert cast.units["ffn"][0].dtype == cast.hidden.dtype == torch.float32
    for a, b in zip(
        plain.units["ffn"] + plain.units["kv_heads"], cast.units["ffn"] + cast.units["kv_heads"], strict=True
    ):
        assert torch.dot(a, b) > 0.97


def test_energy_is_relative_to_its_own_token(llama: Backbone) -> None:
    batch = packed(6)
    found = measure_importance(llama, [batch], next_token_loss)
    x = llama.embed(batch["input_ids"])[0]
    by_hand = torch.stack([row**2 / (row**2).mean() for row in x]).mean(0)
    torch.testing.assert_close(found.energy["layers.0.mixer_norm"], by_hand)
    inside = {f"layers.{i}.{part}_norm" for i in range(3) for part in ("mixer", "ffn")}
    assert set(found.energy) == inside | {"norm"}
    for energy in found.energy.values():
        assert energy.mean().item() == pytest.approx(1, abs=1e-5)


def test_every_norm_has_its_energy_post_norms_included(model: Backbone, batches: list[Batch]) -> None:
    found = measure_importance(model, batches, next_token_loss)
    inside = {f"layers.{i}.{norm}" for i, layer in enumerate(model.blueprint.layers) for norm in layer.norm_names()}
    assert set(found.energy) == inside | {"norm"}


def test_a_layer_that_adds_nothing_has_no_influence(llama: Backbone, batches: list[Batch]) -> None:
    with torch.no_grad():
        llama.layers[1].mixer.o.weight.zero_()
        llama.layers[1].ffn.down.weight.zero_()
    influence = measure_importance(llama, batches, next_token_loss).influence
    assert influence[1].abs() < 1e-6
    assert influence[[0, 2]].min() > 0.01


def test_influence_is_one_minus_the_mean_cosine(llama: Backbone) -> None:
    batch = packed(6)
    stream = list(llama.residuals(batch["input_ids"], batch["position_ids"]))
    a, b = stream[2][0], stream[3][0]
    cosine = ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    found = measure_importance(llama, [batch], next_token_loss).influence
    assert found[2].item() == pytest.approx(1 - cosine.item(), abs=1e-6)


def test_no_batches_nothing_supervised_and_a_broken_loss_are_refused(llama: Backbone, batches: list[Batch]) -> None:
    with pytest.raises(DataError, match="no calibration batches"):
        measure_importance(llama, [], next_token_loss)
    silent = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    with pytest.raises(DataError, match="no token of a calibration batch is trained on"):
        measure_importance(llama, [silent], next_token_loss)
    with torch.no_grad():
        llama.embed.weight[batches[1]["input_ids"][0, 0]] = torch.nan
    with pytest.raises(DataError, match="nan on calibration batch"):
        measure_importance(llama, batches, next_token_loss)
