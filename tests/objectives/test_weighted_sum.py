"""A sum of objectives is the sum of its parts, in value and in what it asks for."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.types import IGNORE, Batch, Head, Needs, Objective, Signals, Terms, supervised_positions
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.cross_entropy import CROSS_ENTROPY, CrossEntropy
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.row_terms import RowObjective
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops.divergence import DIVERGENCES, reverse_kl

BATCH: Batch = {
    "input_ids": torch.arange(1, 9)[None] % 6,
    "labels": torch.tensor([[IGNORE, 2, 3, 4, IGNORE, IGNORE, 1, 2]]),
    "documents": torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]]),
}


class Hidden(nn.Module):
    """|| A h - h' ||^2 between layer 2 of student and assistant: no row objective, with weights of its own."""

    additive = False
    weights: ClassVar[dict[str, float]] = {"hidden": 3.0}

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4, bias=False)

    def needs(self, batch: Batch) -> dict[str, Needs]:
        wanted = Needs(supervised_positions(batch)[0], layers=frozenset({2}))
        return {"student": wanted, "assistant": wanted}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"hidden": 4 * len(supervised_positions(batch)[1])}

    def forward(self, views: dict[str, Signals], frozen: dict[str, Signals], batch: Batch) -> Terms:
        return {"hidden": (self.map(views["student"].layers[2]) - frozen["assistant"].layers[2]).square().sum()}


def network(seed: int) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    rows, weight = torch.randn(5, 4, generator=generator), torch.randn(6, 4, generator=generator)
    head = Head(weight)
    return Signals(rows, head.logits, head, layers={2: torch.randn(5, 4, generator=generator)})


def test_terms_are_those_of_the_parts_unweighted_and_weights_multiply() -> None:
    parts = (
        CrossEntropy(),
        LogitDistillation(),
        Hidden(),
        LogitDistillation(divergence=reverse_kl, name="back", teacher="assistant"),
    )
    whole = WeightedSum(*zip((0.2, 0.3, 0.4, 0.0), parts, strict=True))
    views, frozen = {"student": network(1)}, {"teacher": network(2), "assistant": network(3)}
    found = whole(views, frozen, BATCH)
    assert set(found) == set(whole.weights) == {"cross_entropy", "distill", "back", "hidden"}
    for part in parts:
        for name, value in part(views, frozen, BATCH).items():
            torch.testing.assert_close(found[name], value)
    assert whole.weights == pytest.approx({"cross_entropy": 0.2, "distill": 0.3, "hidden": 1.2, "back": 0.0})


def test_needs_are_united_network_by_network_and_counts_collected() -> None:
    whole = WeightedSum((1.0, LogitDistillation()), (1.0, Hidden()))
    needs = whole.needs(BATCH)
    assert set(needs) == {"student", "teacher", "assistant"}
    assert needs["student"].layers == needs["assistant"].layers == frozenset({2})
    assert needs["teacher"].layers == frozenset()
    assert needs["student"].positions is not None
    assert needs["student"].positions.sum() == 5
    assert whole.counts(BATCH) == {"distill": 5, "hidden": 20}


def test_weights_of_a_part_are_found_to_be_trained_and_saved() -> None:
    whole = WeightedSum((1.0, CrossEntropy()), (0.5, Hidden()))
    assert [tuple(p.shape) for p in whole.parameters()] == [(4, 4)]
    assert list(whole.state_dict()) == ["trained.0.map.weight"]


def test_a_sum_is_additive_if_all_its_parts_are() -> None:
    assert WeightedSum((1.0, CrossEntropy()), (1.0, LogitDistillation())).additive
    assert not WeightedSum((1.0, CrossEntropy()), (1.0, Hidden())).additive


def test_sums_nest() -> None:
    views, frozen = {"student": network(1)}, {"teacher": network(2)}
    inner = WeightedSum((0.5, CrossEntropy()), (0.5, LogitDistillation()))
    outer = WeightedSum((2.0, inner))
    assert outer.weights == {"cross_entropy": 1.0, "distill": 1.0}
    for name, value in outer(views, frozen, BATCH).items():
        torch.testing.assert_close(value, inner(views, frozen, BATCH)[name])


def test_two_terms_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="'distill'"):
        WeightedSum((0.5, LogitDistillation()), (0.5, LogitDistillation(divergence=reverse_kl)))


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_is_negative_or_no_number_is_refused(weight: float) -> None:
    with pytest.raises(UsageError, match="weight"):
        WeightedSum((weight, CrossEntropy()))


def test_a_sum_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="without objectives"):
        WeightedSum()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(UsageError, match="temperature"):
        LogitDistillation(temperature=temperature)


def test_a_student_without_a_head_cannot_train_on_rows() -> None:
    with pytest.raises(UnsupportedModel, match="head"):
        CrossEntropy()({"student": Signals(torch.zeros(5, 6), lambda rows: rows)}, {}, BATCH)


@pytest.mark.parametrize("objective", [CrossEntropy(), LogitDistillation(), WeightedSum((1.0, CrossEntropy()))])
def test_objectives_meet_the_protocol(objective: Objective) -> None:
    assert isinstance(objective, Objective)
    assert set(objective.counts(BATCH)) == set(objective.weights)
    assert isinstance(objective, RowObjective) is not isinstance(objective, WeightedSum)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("forward_kll", "there is no objective 'forward_kll'"),
        ("jsd:gamma=1", "jsd has no option 'gamma'; it has beta"),
        ("jsd:beta", "NAME:OPTION=NUMBER"),
        ("jsd:beta=x", "NAME:OPTION=NUMBER"),
        ("jsd:beta=1=2", "NAME:OPTION=NUMBER"),
        ("forward_kl:beta=0.1", "it has none"),
        ("cross_entropy:beta=0.1", "cross_entropy has no option"),
        ("", "there is no objective ''"),
        ("dskd:divergence=forward_kll", "there is no divergence 'forward_kll'"),
        ("dskd:divergence", "NAME:OPTION=NUMBER"),
        ("dskd:beta=1", "dskd has no option 'beta'; it has divergence"),
    ],
)
def test_an_objective_that_does_not_exist_is_refused_with_what_does(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ObjectiveConfig.parse(text, cross_entropy=0.5, temperature=1.0)


@pytest.mark.parametrize("value", ["nan", "inf", "-0.5", "1.5"])
def test_an_option_out_of_its_range_is_refused_before_training(value: str) -> None:
    with pytest.raises(UsageError, match="beta"):
        ObjectiveConfig.parse(f"jsd:beta={value}", cross_entropy=0.5, temperature=1.0)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_of_cross_entropy_lies_between_0_and_1(share: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        ObjectiveConfig(cross_entropy=share)


@pytest.mark.parametrize("name", [CROSS_ENTROPY, *DIVERGENCES])
def test_every_name_builds_an_objective_that_gives_what_it_says(name: str) -> None:
    mixture = ObjectiveConfig.parse(name, cross_entropy=0.25, temperature=2.0)
    views, frozen = {"student": network(1)}, {"teacher": network(2)}
    built = mixture.build()
    found = built(views, frozen, BATCH)
    assert set(found) == set(built.weights)
    if mixture.uses_teacher:
        assert built.weights == {"cross_entropy": 0.25, name: 0.75}
        alone = LogitDistillation(divergence=DIVERGENCES[name], temperature=2.0)(views, frozen, BATCH)["distill"]
        torch.testing.assert_close(found[name], alone)


def test_options_reach_the_divergence() -> None:
    views, frozen = {"student": network(1)}, {"teacher": network(2)}
    values = {
        ObjectiveConfig.parse(f"jsd:beta={beta}", cross_entropy=0.0, temperature=1.0)
        .build()(views, frozen, BATCH)["jsd"]
        .item()
        for beta in (0.1, 0.5, 0.9)
    }
    assert len(values) == 3


def test_shares_at_the_ends_leave_one_term() -> None:
    assert ObjectiveConfig(cross_entropy=0.0).build().weights == {"forward_kl": 1.0}
    assert ObjectiveConfig(cross_entropy=1.0).build().weights == {"cross_entropy": 1.0}
    assert not ObjectiveConfig(cross_entropy=1.0).uses_teacher
    assert not ObjectiveConfig(name="cross_entropy").uses_teacher
    assert ObjectiveConfig().uses_teacher
