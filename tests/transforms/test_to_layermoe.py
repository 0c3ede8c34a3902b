"""LayerMoE: similarity against the full matrix of cosines, the allocation of its authors, and the start."""

from itertools import pairwise

import pytest
import torch
from tests.transforms.test_to_experts import DENSE, batch_of, network
from torch import Tensor
from torch.nn.functional import cosine_similarity

from potstill.core.errors import DataError, UsageError
from potstill.core.language import number_language
from potstill.core.types import Batch
from potstill.models.families.registry import find_family, list_parameter_shapes
from potstill.train.selection import match_names
from potstill.transforms.convert.language_similarity import allocate_experts, compute_similarity, measure_directions
from potstill.transforms.convert.to_layermoe import ToLayerMoE

LANGUAGES = ("en", "de", "fr", "en")

# `similarity/llama3.2-3B-G1.xlsx` of github.com/XZhang00/LayerMoE: S of the 28 layers of Llama-3.2-3B for Greek,
# Hungarian and Turkish beside English, Spanish and Chinese, and the experts of each layer for a budget of 70.
SIMILARITY = (
    *(0.0359388889, 0.0402166667, 0.0352166667, 0.0503444444, 0.0635555556, 0.0697611111, 0.0842277778, 0.0960111111),
    *(0.0944888889, 0.0977722222, 0.1059555556, 0.1093777778, 0.1164444444, 0.1074388889, 0.1151555556, 0.1108555556),
    *(0.0972500000, 0.0907333333, 0.0830333333, 0.0835388889, 0.0778277778, 0.0683277778, 0.0684666667, 0.0548000000),
    *(0.0498111111, 0.0496611111, 0.0481000000, 0.0453444444),
)
EXPERTS = (5, 5, 5, 4, 3, 3, *[2] * 12, *[3] * 5, *[4] * 5)


def labeled_batches() -> list[Batch]:
    """Two batches of two rows, each row in a language."""
    numbers = [number_language(name) for name in LANGUAGES]
    batches = [batch_of(), batch_of()]
    for batch, pair in zip(batches, (numbers[:2], numbers[2:]), strict=True):
        batch["languages"] = torch.tensor(pair)[:, None].expand(-1, 24)
    return batches


@torch.no_grad()
def test_the_similarity_is_the_mean_of_all_pairs_of_cosines() -> None:
    model, batches = network(), labeled_batches()
    inputs: dict[str, list[Tensor]] = {name: [] for name in LANGUAGES}
    for batch, names in zip(batches, (LANGUAGES[:2], LANGUAGES[2:]), strict=True):
        captured: list[Tensor] = []
        hooks = [layer.ffn.register_forward_pre_hook(lambda _, x, c=captured: c.append(x[0])) for layer in model.layers]
        model(batch["input_ids"], batch["position_ids"])
        for hook in hooks:
            hook.remove()
        for row, name in enumerate(names):
            inputs[name].append(torch.stack([x[row] for x in captured]))

    def similarity(a: str, b: str) -> Tensor:
        x, y = (torch.cat(inputs[name], 1) for name in (a, b))
        return torch.stack([cosine_similarity(p[:, None], q[None], dim=-1).mean() for p, q in zip(x, y, strict=True)])

    directions = measure_directions(model, batches)
    old = (similarity("de", "en") + similarity("fr", "en")) / 2
    torch.testing.assert_close(compute_similarity(directions, ["en"]), (similarity("de", "fr") + old) / 2)
    alone = compute_similarity(directions, ["en", "fr"])  # one new language has no pair of its own
    torch.testing.assert_close(alone, (similarity("de", "en") + similarity("de", "fr")) / 2)


def test_the_experts_are_those_of_the_sheet_and_of_the_authors() -> None:
    assert allocate_experts((0.035, 0.05, 0.1, 0.12), 12.0) == (6, 4, 2, 2)
    assert allocate_experts(SIMILARITY, 70.0) == EXPERTS
    assert (sum(EXPERTS), sum(EXPERTS) - len(EXPERTS)) == (84, 56)
    assert allocate_experts((0.5, 0.5, 0.5), 9.0) == (3, 3, 3)
    assert allocate_experts((1.0, 1e-3), 4.0)[0] == 2  # never fewer


def test_layers_that_are_less_alike_have_no_fewer_experts() -> None:
    similarity = torch.rand(20).add(0.01).tolist()
    counts = allocate_experts(similarity, 60.0)
    pairs = sorted(zip(similarity, counts, strict=True))
    assert all(before >= after for (_, before), (_, after) in pairwise(pairs))
    assert sum(counts) >= 60


@torch.no_grad()
def test_the_model_starts_as_the_original_and_says_what_it_measured() -> None:
    model, batches = network(), labeled_batches()
    converted, facts = ToLayerMoE(old="en", budget=11).convert(model, batches)
    x = (batches[0]["input_ids"], batches[0]["position_ids"])
    torch.testing.assert_close(converted(*x), model(*x), rtol=0, atol=1e-10)
    counts = [layer.ffn.count for layer in converted.blueprint.layers]
    assert facts["experts"] == counts == list(allocate_experts(facts["language_similarity"], 11.0))
    assert all(layer.ffn.top_k == 2 for layer in converted.blueprint.layers)


def test_experts_are_stored_apart_so_that_the_first_can_rest() -> None:
    planned = ToLayerMoE(old="en").blueprint(DENSE)
    assert [layer.ffn.count for layer in planned.layers] == [3] * 4
    assert find_family(planned) is None
    names = match_names(list_parameter_shapes(planned), r"router|experts\.[1-9]")
    assert {name.split("ffn.")[1] for name in names if "layers.2" in name} == {
        *("router.weight", *(f"experts.{i}.{x}.weight" for i in (1, 2) for x in ("gate", "up", "down")))
    }


def test_what_cannot_be_is_refused() -> None:
    model, batches = network(), labeled_batches()
    with pytest.raises(UsageError, match="name the old languages"):
        ToLayerMoE()
    with pytest.raises(UsageError, match="the budget is 0"):
        ToLayerMoE(old="en", budget=0)
    with pytest.raises(DataError, match="no calibration text is in 'es'"):
        ToLayerMoE(old="en/es").convert(model, batches)
    with pytest.raises(DataError, match="all calibration text is in en, de, fr"):
        ToLayerMoE(old="en/de/fr").convert(model, batches)
