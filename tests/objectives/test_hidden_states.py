"""Hidden states and relations against their definitions: values, who gets a gradient, and who must not."""

import pytest
import torch
from tests.models.test_signals import CONFIGS, model_of
from tests.objectives.test_dual_space import BATCH, CROSSED, gradients
from torch import Tensor

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.types import ALIGNED_PAIRS, Batch, Head, Needs, Signals, supervised_positions
from potstill.data.packing import collate
from potstill.models.signals import compute_signals
from potstill.objectives.attention_relations import AttentionRelations, find_num_heads
from potstill.objectives.hidden_states import HiddenStates, map_layers_evenly
from potstill.ops.relation import relation_kl

WIDTHS = {"queries": 8, "keys": 4, "values": 4}


def network(rows: int, width: int, seed: int) -> Signals:
    torch.manual_seed(seed)
    states, weight = torch.randn(rows, width).double(), torch.randn(9, width).double()
    layers = {layer: torch.randn(rows, width).double().requires_grad_() for layer in (1, 2, 4)}
    related = {name: torch.randn(rows, wide).double().requires_grad_() for name, wide in WIDTHS.items()}
    head = Head(weight.requires_grad_())
    return Signals(states.requires_grad_(), head.logits, head, layers=layers, relations=related)


def parts(objective: torch.nn.Module, student: Signals, teacher: Signals) -> dict[str, Tensor]:
    found = dict(objective.named_parameters())
    for name, one in (("student", student), ("teacher", teacher)):
        found |= {f"{name}.layer{n}": layer for n, layer in one.layers.items()}
        found |= {f"{name}.{which}": states for which, states in one.relations.items()}
        assert one.head is not None
        found |= {f"{name}.rows": one.rows, f"{name}.head": one.head.weight}
    return found


@pytest.mark.parametrize("batch", [BATCH, CROSSED])
def test_hidden_states_are_compared_layer_by_layer_in_units_of_the_teachers(batch: Batch) -> None:
    student, teacher = network(5, 4, 1), network(4 if batch is CROSSED else 5, 6, 2)
    objective = HiddenStates((4, 6), [(1, 2), (2, 4)]).double()
    found = objective({"student": student}, {"teacher": teacher}, batch)["hidden"]
    ours, theirs = batch.get(ALIGNED_PAIRS, torch.arange(5).expand(2, -1))
    expected = torch.tensor(0.0).double()
    for (a, b), to_teacher in zip(objective.layers, objective.maps, strict=True):
        for n, m in zip(ours.tolist(), theirs.tolist(), strict=True):
            wanted = teacher.layers[b][m]
            error = to_teacher.weight @ student.layers[a][n] - wanted
            expected = expected + error.square().mean() / wanted.square().mean() / 2
    torch.testing.assert_close(found, expected)
    assert objective.counts(batch) == {"hidden": len(ours)}
    reached = {k for k, g in gradients(found, parts(objective, student, teacher)).items() if g is not None}
    assert reached == {"maps.0.weight", "maps.1.weight", "student.layer1", "student.layer2"}


def test_hidden_states_that_are_the_same_give_nothing_and_a_silent_student_one() -> None:
    student, teacher = network(5, 6, 1), network(5, 6, 1)
    objective = HiddenStates((6, 6), [(1, 1), (2, 2)]).double()
    for one, value in ((torch.eye(6), 0.0), (torch.zeros(6, 6), 5.0)):
        for to_teacher in objective.maps:
            to_teacher.weight.data = one.double()
        found = objective({"student": student}, {"teacher": teacher}, BATCH)["hidden"]
        assert found.item() == pytest.approx(value, abs=1e-12)


def test_hidden_states_ask_for_their_layers_alone() -> None:
    needs = HiddenStates((4, 6), [(1, 2), (2, 4)]).needs(BATCH)
    assert needs["student"].layers == {1, 2}
    assert needs["teacher"].layers == {2, 4}


@pytest.mark.parametrize(
    ("depths", "pairs", "expected"),
    [
        ((12, 30), 4, [(3, 8), (6, 15), (9, 22), (12, 30)]),
        ((12, 30), 1, [(12, 30)]),
        ((3, 2), 4, [(2, 1), (3, 2)]),
    ],
)
def test_layers_are_the_last_and_others_evenly_spread(
    depths: tuple[int, int], pairs: int, expected: list[tuple[int, int]]
) -> None:
    assert map_layers_evenly(depths, pairs) == expected


def test_no_layers_and_heads_that_divide_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="no pair of layers"):
        HiddenStates((4, 6), [])
    with pytest.raises(UsageError, match="3 relation heads"):
        AttentionRelations(4, WIDTHS, heads=3)


def test_heads_are_as_many_as_divide_every_width() -> None:
    assert find_num_heads({"queries": 576, "keys": 192, "values": 192}, 32) == 32
    assert find_num_heads({"queries": 48, "keys": 24, "values": 24}, 32) == 24
    assert find_num_heads({"queries": 48, "keys": 24, "values": 24}, 9) == 8


@pytest.mark.parametrize("batch", [BATCH, CROSSED])
def test_relations_are_those_of_three_maps_of_the_final_state(batch: Batch) -> None:
    student, teacher = network(5, 4, 1), network(4 if batch is CROSSED else 5, 6, 2)
    objective = AttentionRelations(4, WIDTHS, heads=2).double()
    found = objective({"student": student}, {"teacher": teacher}, batch)["relations"]
    ours, theirs = batch.get(ALIGNED_PAIRS, torch.arange(5).expand(2, -1))
    documents = supervised_positions(batch)[2][ours]
    expected = [
        relation_kl(teacher.relations[name][theirs], own(student.rows[ours]), documents, heads=2) / 3
        for name, own in zip(WIDTHS, objective.maps, strict=True)
    ]
    torch.testing.assert_close(found, sum(expected, torch.tensor(0.0)))
    reached = {k for k, g in gradients(found, parts(objective, student, teacher)).items() if g is not None}
    assert reached == {"maps.0.weight", "maps.1.weight", "maps.2.weight", "student.rows"}
    teacher.relations.update({n: own(student.rows) for n, own in zip(WIDTHS, objective.maps, strict=True)})  # type: ignore[attr-defined]
    same = objective({"student": student}, {"teacher": teacher}, BATCH)["relations"]
    assert abs(same.item()) < 1e-12


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "cohere", "phi", "opt"])
def test_queries_keys_and_values_are_what_the_last_attention_projects(family: str) -> None:
    model = model_of(CONFIGS[family])
    ids = torch.randint(3, 97, (9,))
    batch = collate([{"input_ids": ids, "labels": ids, "lengths": torch.tensor([9])}])
    positions = supervised_positions(batch)[0]
    with torch.no_grad():
        said = compute_signals(model, batch, Needs(positions, relations=frozenset(WIDTHS)))
        entered: list[Tensor] = []
        last = [m for m in model.modules() if hasattr(m, "q_proj")][-1]
        hook = last.q_proj.register_forward_hook(lambda _, given, __: entered.append(given[0]))
        model(input_ids=ids[None], use_cache=False)
        hook.remove()
        assert set(said.relations) == set(WIDTHS)
        for name, own in (("queries", last.q_proj), ("keys", last.k_proj), ("values", last.v_proj)):
            torch.testing.assert_close(said.relations[name], own(entered[0])[positions], rtol=1e-5, atol=1e-5)
    assert not any(m._forward_hooks for m in model.modules()), "no hook stays behind"


@pytest.mark.parametrize("family", ["gpt2", "bloom", "mamba"])
def test_a_family_that_projects_them_together_or_not_at_all_is_refused(family: str) -> None:
    model, ids = model_of(CONFIGS[family]), torch.randint(3, 97, (9,))
    batch = collate([{"input_ids": ids, "labels": ids, "lengths": torch.tensor([9])}])
    with pytest.raises(UnsupportedModel, match="queries, keys and values"):
        compute_signals(model, batch, Needs(supervised_positions(batch)[0], relations=frozenset({"keys"})))
