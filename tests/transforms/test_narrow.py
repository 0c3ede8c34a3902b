"""A narrowed network is the old one with the removed units masked out."""

import pytest
import torch
from tests.transforms.small import masked_loss, ones, packed
from torch import Tensor

from potstill.core.errors import UsageError
from potstill.core.types import Batch
from potstill.models.backbone import Backbone
from potstill.transforms.apply import apply_transform
from potstill.transforms.importance import ImportanceScores, measure_importance, next_token_loss
from potstill.transforms.narrow import Narrow, select_units


def masks(model: Backbone, narrow: Narrow) -> dict[str, Tensor]:
    """0 where `narrow` removes a unit."""
    found = {name: torch.zeros_like(mask) for name, mask in ones(model).items()}
    for i in range(len(model.layers)):
        for mask, name in (("xi", "kv_heads"), ("nu", "ffn")):
            units = narrow.units[name][i] if name in narrow.units else None
            found[mask][i, list(range(found[mask].shape[1]) if units is None else units)] = 1
    found["eta"][list(narrow.hidden if narrow.hidden else range(16))] = 1
    return found


CUTS = {
    "heads": Narrow(units={"kv_heads": ((0, 2), (1, 2), (0, 1))}),
    "one head": Narrow(units={"kv_heads": ((2,), (0,), (1,))}),
    "neurons": Narrow(units={"ffn": ((0, 3, 9), (1, 2, 4), (5, 6, 7))}),
    "widths that differ between layers": Narrow(
        units={"kv_heads": ((0,), (0, 1), None), "ffn": ((0,), (1, 2), (3, 4, 5))}
    ),
    "hidden": Narrow(hidden=(0, 1, 4, 5, 6, 9, 10, 15)),
    "all": Narrow(
        units={"kv_heads": ((0, 2), (1, 2), (0, 1)), "ffn": ((0, 9), (1, 2), (5, 7))}, hidden=(2, 3, 5, 7, 11, 13)
    ),
}


@pytest.mark.parametrize("narrow", CUTS.values(), ids=CUTS)
@torch.no_grad()
def test_removing_units_is_masking_them(narrow: Narrow, model: Backbone) -> None:
    batch = packed(6, 7)
    kept = torch.tensor(narrow.hidden) if narrow.hidden else None
    expected = masked_loss(model, batch, masks(model, narrow), mean_over=kept)
    torch.testing.assert_close(next_token_loss(apply_transform(narrow, model), batch), expected, rtol=1e-5, atol=1e-5)
    assert abs(expected - next_token_loss(model, batch)) > 1e-3  # what is removed was heard


def test_keeping_all_is_the_same_model_to_the_bit(model: Backbone) -> None:
    every = Narrow(units={"kv_heads": ((0, 1, 2),) * 3, "ffn": (tuple(range(10)),) * 3}, hidden=tuple(range(16)))
    for narrow in (every, Narrow()):
        new = apply_transform(narrow, model)
        assert new.blueprint == model.blueprint
        assert all(torch.equal(w, model.state_dict()[name]) for name, w in new.state_dict().items())


@torch.no_grad()
def test_the_order_of_units_does_not_matter(llama: Backbone) -> None:
    """Heads, neurons and coordinates of the old model in another order: the narrowed one says the same."""
    batch, old = packed(6, 7), llama.state_dict()
    heads, neurons, hidden = torch.tensor([2, 0, 1]), torch.randperm(10), torch.randperm(16)
    wide, queries = (heads[:, None] * 4 + torch.arange(4)).flatten(), (heads[:, None] * 8 + torch.arange(8)).flatten()
    rows = {"q": queries, "k": wide, "v": wide, "gate": neurons, "up": neurons}
    columns = {"o": queries, "down": neurons}
    renamed = Backbone(llama.blueprint)
    new = {}
    for name, weight in old.items():
        part = name.split(".")[-2]
        weight = (
            weight[rows[part]] if part in rows else weight[hidden] if weight.ndim == 1 or part in columns else weight
        )
        new[name] = weight if weight.ndim == 1 else weight[:, columns.get(part, hidden)]
    renamed.load_state_dict(new)
    torch.testing.assert_close(next_token_loss(renamed, batch), next_token_loss(llama, batch))
    chosen = (
        select_units(measure_importance(m, [batch], next_token_loss), kv_heads=2, ffn=6, hidden=10)
        for m in (llama, renamed)
    )
    one, other = (apply_transform(narrow, m) for narrow, m in zip(chosen, (llama, renamed), strict=True))
    torch.testing.assert_close(next_token_loss(one, batch), next_token_loss(other, batch))


def test_fewer_units_are_a_subset_of_more(model: Backbone, batches: list[Batch]) -> None:
    found = measure_importance(model, batches, next_token_loss)
    for size in range(1, 10):
        less, more = select_units(found, ffn=size, hidden=size), select_units(found, ffn=size + 1, hidden=size + 1)
        assert all(set(a) < set(b) for a, b in zip(less.units["ffn"], more.units["ffn"], strict=True))
        assert set(less.hidden or ()) < set(more.hidden or ())
        assert all(len(kept) == size for kept in less.units["ffn"])


def statistics(**changes: Tensor) -> ImportanceScores:
    """Scores of one layer, made up."""
    given = {"heads": torch.tensor([0.1, 0.9, 0.5]), "neurons": torch.tensor([4.0, 1, 3, 2]), "hidden": torch.ones(4)}
    given |= changes
    energy = {"norm": torch.tensor([1.0, 1.44, 1.56, 0.0])}
    units = {"kv_heads": (given["heads"],), "ffn": (given["neurons"],)}
    return ImportanceScores(units, given["hidden"], torch.ones(1), energy, loss=1.0, batches=1, tokens=9)


def test_the_highest_scores_are_kept_in_their_old_order() -> None:
    narrow = select_units(
        statistics(hidden=torch.tensor([0.1, 0.4, 0.3, 0.4])), kv_heads=2, ffn=2, hidden=3, rescale=False
    )
    assert narrow == Narrow(units={"kv_heads": ((1, 2),), "ffn": ((0, 2),)}, hidden=(1, 2, 3))
    assert select_units(statistics(), hidden=2).hidden == (0, 1)  # a tie keeps the earlier


def test_gain_is_the_root_of_the_kept_energy() -> None:
    assert select_units(statistics(), hidden=2).gain["norm"] == pytest.approx(1.22**0.5)
    assert select_units(statistics(), hidden=4).gain["norm"] == pytest.approx(1.0)
    assert select_units(statistics(), hidden=2, rescale=False).gain == {}
    assert select_units(statistics(), ffn=2).gain == {}  # norms do not change where hidden does not


@torch.no_grad()
def test_gain_multiplies_what_a_norm_gives(model: Backbone) -> None:
    x = torch.randn(4, 16)
    for norm in model.blueprint.layers[0].norm_names():
        new = apply_transform(Narrow(gain={f"layers.0.{norm}": 1.5}), model)
        given, before = (m.layers[0].get_submodule(norm)(x) for m in (new, model))
        torch.testing.assert_close(given, 1.5 * before)


@torch.no_grad()
def test_gain_restores_the_size_of_what_comes_out_of_a_norm(llama: Backbone) -> None:
    llama.embed.weight[:, 8:] *= 3  # the coordinates that go are the large ones
    batch, kept = packed(40), tuple(range(8))
    found = measure_importance(llama, [batch], next_token_loss)
    gain = {"layers.0.mixer_norm": found.energy["layers.0.mixer_norm"][:8].mean().sqrt().item()}
    x = llama.embed(batch["input_ids"])
    whole = llama.layers[0].mixer_norm(x)[..., :8]
    plain, scaled = (
        apply_transform(Narrow(hidden=kept, gain=g), llama).layers[0].mixer_norm(x[..., :8]) for g in ({}, gain)
    )
    assert (scaled.norm() / whole.norm()).item() == pytest.approx(1, abs=0.05)
    assert plain.norm() / whole.norm() > 1.5


@pytest.mark.parametrize("what", ["kv_heads", "ffn", "hidden"])
@torch.no_grad()
def test_importance_loses_less_than_chance_and_chance_less_than_its_reverse(
    what: str, trained: tuple[Backbone, list[Batch], list[Batch]]
) -> None:
    """30 % of the heads, neurons or coordinates of a trained character model are removed."""
    model, seen, unseen = trained
    found = measure_importance(model, seen, next_token_loss)
    size = {"kv_heads": 8, "ffn": 96, "hidden": 48}[what]

    def loss(scores: ImportanceScores) -> float:
        return next_token_loss(
            apply_transform(select_units(scores, **{what: round(0.7 * size)}), model), unseen[0]
        ).item()

    def reordered(order: object) -> ImportanceScores:
        units = {name: tuple(map(order, scores)) for name, scores in found.units.items()}  # type: ignore[call-overload]
        counts = {"loss": found.loss, "batches": found.batches, "tokens": found.tokens}
        return ImportanceScores(units, order(found.hidden), found.influence, found.energy, **counts)  # type: ignore

    chance = [loss(reordered(lambda s: s[torch.randperm(len(s))])) for _ in range(5)]
    base = next_token_loss(model, unseen[0]).item()
    best, worst, middle = loss(found), loss(reordered(torch.neg)), sum(chance) / 5
    assert base - 0.05 < best < middle < worst


BAD = {
    "descending": (Narrow(hidden=(3, 2)), r"ascending indices from 0 to 15, not \[3, 2\]"),
    "twice": (Narrow(hidden=(3, 3)), "ascending"),
    "negative": (Narrow(units={"ffn": ((-1, 2),) * 3}), "ffn of layer 0"),
    "too high": (Narrow(units={"kv_heads": ((0,), (3,), (0,))}), "kv_heads of layer 1"),
    "empty": (Narrow(units={"kv_heads": ((), (0,), (0,))}), "no kv_heads of layer 0 would be kept"),
    "no hidden": (Narrow(hidden=()), "no hidden coordinates"),
    "too few layers": (Narrow(units={"kv_heads": ((0,),)}), "kv_heads names 1 layers, the model has 3"),
    "no such cut": (Narrow(units={"channels": ((0,),) * 3}), "layer 0 has no channels to cut; it is made of attention"),
    "no such norm": (Narrow(gain={"layers.9.ffn_norm": 1.0}), "gain names 'layers.9.ffn_norm'"),
}


@pytest.mark.parametrize(("narrow", "message"), BAD.values(), ids=BAD)
def test_indices_that_are_not_of_this_model_are_refused(narrow: Narrow, message: str, llama: Backbone) -> None:
    with pytest.raises(UsageError, match=message):
        apply_transform(narrow, llama)


@pytest.mark.parametrize("size", [0, 5, -1])
def test_a_width_that_cannot_be_kept_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"cannot keep ffn {size} of 4; keep 1 to 4"):
        select_units(statistics(), ffn=size)
