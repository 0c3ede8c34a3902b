"""Dual-space objectives against their definitions: values, who gets a gradient, and who must not."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from potstill.core.errors import UnsupportedModel
from potstill.core.types import ALIGNED_PAIRS, IGNORE, Batch, Head, Signals, supervised_positions
from potstill.objectives.cross_entropy import CrossEntropy
from potstill.objectives.dskd import DSKD
from potstill.objectives.dskdv2 import DSKDv2
from potstill.objectives.dual_space import DualSpaceConfig
from potstill.objectives.row_matching import AlignedRowMatcher, CrossModelAttention
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops.divergence import DIVERGENCES, forward_kl, reverse_kl

STUDENT, TEACHER = 4, 6  # widths
IDS, OTHER_IDS = 9, 11
BATCH: Batch = {
    "input_ids": torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]),
    "labels": torch.tensor([[IGNORE, 2, 3, 4, IGNORE, IGNORE, 7, 8]]),
    "documents": torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]]),
}
TARGETS = torch.tensor([2, 3, 4, 7, 8])
SEGMENTS = torch.tensor([0, 0, 0, 1, 1])
CROSSED: Batch = {
    **BATCH,
    "teacher.input_ids": torch.tensor([[3, 4, 5, 6, 7, 8]]),
    "teacher.labels": torch.tensor([[IGNORE, 4, 5, IGNORE, 7, 10]]),
    "teacher.documents": torch.tensor([[0, 0, 0, 1, 1, 1]]),
    ALIGNED_PAIRS: torch.tensor([[0, 2, 4], [0, 1, 3]]),
}
OTHER_SEGMENTS = torch.tensor([0, 0, 1, 1])


def network(rows: int, width: int, ids: int, seed: int, *, trained: bool = False) -> Signals:
    torch.manual_seed(seed)
    states, weight = torch.randn(rows, width).double(), torch.randn(ids, width).double()
    embeddings = torch.randn(rows, 2, width).double()
    states, weight = (x.requires_grad_(trained) for x in (states, weight))
    head = Head(weight)
    return Signals(states, head.logits, head, extras={"embeddings": embeddings.requires_grad_(trained)})


def pair(*, crossed: bool = False) -> tuple[dict[str, Signals], dict[str, Signals]]:
    rows, ids = (4, OTHER_IDS) if crossed else (5, IDS)
    return {"student": network(5, STUDENT, IDS, 1, trained=True)}, {"teacher": network(rows, TEACHER, ids, 2)}


def gradients(value: Tensor, of: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    found = torch.autograd.grad(value, list(of.values()), allow_unused=True, retain_graph=True)
    return dict(zip(of, found, strict=True))


def parts(objective: torch.nn.Module, student: Signals) -> dict[str, Tensor]:
    assert student.head is not None
    own = {"states": student.rows, "head": student.head.weight, "embeddings": student.extras["embeddings"]}
    return own | dict(objective.named_parameters())


def reached(value: Tensor, of: Mapping[str, Tensor]) -> set[str]:
    return {name for name, g in gradients(value, of).items() if g is not None and bool(g.any())}


def first(divergence: str = "forward_kl", temperature: float = 1.0) -> DSKD:
    torch.manual_seed(3)
    spaces = DualSpaceConfig(divergence=DIVERGENCES[divergence], temperature=temperature)
    return DSKD(STUDENT, TEACHER, spaces).double()


def second(views: dict[str, Signals], frozen: dict[str, Signals], spaces: DualSpaceConfig | None = None) -> DSKDv2:
    student, teacher = views["student"].head, frozen["teacher"].head
    assert student is not None
    assert teacher is not None
    made = DSKDv2(student.weight, teacher.weight, spaces)
    torch.manual_seed(4)  # away from where it starts, where the projected logits nearly agree
    with torch.no_grad():
        made.to_student += 0.1 * torch.randn_like(made.to_student)
    return made


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_values_are_those_of_the_equations(divergence: str, temperature: float) -> None:
    views, frozen = pair()
    objective = first(divergence, temperature)
    student, teacher = views["student"], frozen["teacher"]
    assert student.head is not None
    assert teacher.head is not None
    t2s = objective.to_student(teacher.rows) @ student.head.weight.mT
    s2t = objective.to_teacher(student.rows) @ teacher.head.weight.mT
    ours, theirs = student.logits(student.rows), teacher.logits(teacher.rows)
    tau = temperature
    found = objective(views, frozen, BATCH)
    expected = {
        "dskd_student_space": tau**2 * DIVERGENCES[divergence](t2s / tau, ours / tau).sum(),
        "dskd_projector": cross_entropy(t2s, TARGETS, reduction="sum"),
        "dskd_teacher_space": tau**2 * forward_kl(theirs / tau, s2t / tau).sum(),
    }
    assert set(found) == set(objective.weights) == set(objective.counts(BATCH)) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_each_term_trains_what_the_table_says() -> None:
    views, frozen = pair()
    objective = first()
    found, of = objective(views, frozen, BATCH), parts(objective, views["student"])
    to_student, to_teacher = {"to_student.weight", "to_student.bias"}, {"to_teacher.weight", "to_teacher.bias"}
    assert reached(found["dskd_student_space"], of) == {"states", "head"}
    assert reached(found["dskd_projector"], of) == to_student
    assert reached(found["dskd_teacher_space"], of) == {"states", *to_teacher}


def test_cross_attention_is_trained_by_the_projector_and_the_teachers_space() -> None:
    views, frozen = pair(crossed=True)
    objective = crossing()
    batch = right_at([1, 3], by_attention(objective, views["student"], frozen["teacher"])[0])
    found, of = objective(views, frozen, batch), parts(objective, views["student"])
    query = {"bridge.query.weight", "bridge.query.bias"}
    query_of_softmax = {"bridge.query.weight"} | query
    assert reached(found["dskd_projector"], of) == {"to_student.weight", "to_student.bias"} | query_of_softmax
    assert reached(found["dskd_teacher_space"], of) == {"states", "to_teacher.weight", "to_teacher.bias"} | query
    assert reached(found["dskd_student_space"], of) == {"states", "head"}


def crossing() -> DSKD:
    torch.manual_seed(5)
    return DSKD(STUDENT, TEACHER, row_matcher=CrossModelAttention(STUDENT, TEACHER, embedding_std=0.7)).double()


def by_attention(objective: DSKD, student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
    """Z_t2s and Z_s2t of `CROSSED`, as one masked matrix says."""
    bridge = objective.bridge
    assert isinstance(bridge, CrossModelAttention)
    assert student.head is not None
    assert teacher.head is not None
    e_s, e_t = student.extras["embeddings"].flatten(1), teacher.extras["embeddings"].flatten(1) / 0.7
    scores = bridge.query(e_s) @ e_t.mT / math.sqrt(2 * TEACHER)
    scores = scores.masked_fill(SEGMENTS[:, None] != OTHER_SEGMENTS[None], -math.inf)
    value = objective.to_student(teacher.rows / teacher.rows.std(1, keepdim=True) + e_t[:, TEACHER:])
    s2t = scores.softmax(0).mT @ objective.to_teacher(student.rows) @ teacher.head.weight.mT
    return scores.softmax(1) @ value @ student.head.weight.mT, s2t


def right_at(some: list[int], t2s: Tensor) -> Batch:
    """`CROSSED` with other labels: at the rows `some` the token that Z_t2s prefers, at all others the next one."""
    wished = (t2s.argmax(1) + 1) % IDS
    wished[some] = t2s.argmax(1)[some]
    labels = CROSSED["labels"].clone()
    labels[labels != IGNORE] = wished
    return {**CROSSED, "labels": labels}


@pytest.mark.parametrize("some", [[], [0, 3], [0, 1, 2, 3, 4]])
def test_cross_attention_is_that_of_the_equations_and_counts_where_the_projection_is_right(some: list[int]) -> None:
    views, frozen = pair(crossed=True)
    objective = crossing()
    student, teacher = views["student"], frozen["teacher"]
    t2s, s2t = by_attention(objective, student, teacher)
    batch = right_at(some, t2s)
    targets = supervised_positions(batch)[1]
    found = objective(views, frozen, batch)
    kd = forward_kl(t2s, student.logits(student.rows))
    assert kd.min() > 1e-2, "the test wants every row to matter"
    torch.testing.assert_close(found["dskd_student_space"], kd[some].sum())
    torch.testing.assert_close(found["dskd_projector"], cross_entropy(t2s, targets, reduction="sum"))
    torch.testing.assert_close(found["dskd_teacher_space"], forward_kl(teacher.logits(teacher.rows), s2t).sum())
    assert objective.counts(batch) == {"dskd_student_space": 5, "dskd_projector": 5, "dskd_teacher_space": 4}


def test_a_document_of_which_the_teacher_has_no_row_changes_no_mean() -> None:
    views, frozen = pair(crossed=True)
    objective, labels = crossing(), CROSSED["teacher.labels"].clone()
    labels[:, 3:] = IGNORE
    batch = {**CROSSED, "teacher.labels": labels}
    alone = {name: values[:, : 3 if name.startswith("teacher") else 5] for name, values in batch.items()}
    student, teacher = (
        replace(one, rows=one.rows[:kept], extras={"embeddings": one.extras["embeddings"][:kept]})
        for one, kept in ((views["student"], 3), (frozen["teacher"], 2))
    )
    found = objective(views, {"teacher": teacher}, batch)
    expected = objective({"student": student}, {"teacher": teacher}, alone)
    assert objective.counts(batch) == objective.counts(alone)
    assert list(objective.counts(batch).values()) == [3, 3, 2]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_the_second_version_learns_from_the_teachers_own_choice_where_the_projection_agrees(divergence: object) -> None:
    views, frozen = pair()
    objective = second(views, frozen, DualSpaceConfig(divergence=divergence, name="v2"))  # type: ignore[arg-type]
    student, teacher = views["student"], frozen["teacher"]
    assert student.head is not None
    assert teacher.head is not None
    w_s, w_t = student.head.weight.detach(), teacher.head.weight
    t2s = teacher.rows @ objective.to_student @ w_s.mT
    s2t = student.rows @ (w_s.mT @ torch.linalg.pinv(w_t.mT)) @ w_t.mT
    theirs, ours = teacher.logits(teacher.rows), student.logits(student.rows)
    agreed = t2s.argmax(1) == theirs.argmax(1)
    assert 0 < agreed.sum() < 5
    found = objective(views, frozen, BATCH)
    torch.testing.assert_close(found["v2_student_space"], (agreed * divergence(t2s, ours)).sum())  # type: ignore[operator]
    torch.testing.assert_close(found["v2_projector"], cross_entropy(t2s, theirs.argmax(1), reduction="sum"))
    torch.testing.assert_close(found["v2_teacher_space"], divergence(theirs, s2t).sum())  # type: ignore[operator]
    of = parts(objective, student)
    assert reached(found["v2_student_space"], of) == {"states", "head"}
    assert reached(found["v2_projector"], of) == {"to_student"}
    assert reached(found["v2_teacher_space"], of) == {"states"}


def require_silent(found: Mapping[str, Tensor], names: Collection[str], of: Mapping[str, Tensor]) -> None:
    """The terms of these names are zero and have no gradient; the projector's is neither."""
    for name in names:
        assert abs(found[name].item()) < 1e-12
        for gradient in gradients(found[name], of).values():
            assert gradient is None or gradient.abs().max() < 1e-12
    (projector,) = set(found) - set(names)
    assert found[projector] > 0.1
    assert reached(found[projector], of)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient_where_both_maps_change_nothing(
    divergence: str, temperature: float
) -> None:
    student, teacher = network(5, TEACHER, IDS, 2, trained=True), network(5, TEACHER, IDS, 2)
    spaces = DualSpaceConfig(divergence=DIVERGENCES[divergence], temperature=temperature)
    objective = DSKD(TEACHER, TEACHER, spaces).double()
    with torch.no_grad():
        for way in (objective.to_student, objective.to_teacher):
            way.weight.copy_(torch.eye(TEACHER))
            way.bias.zero_()
    found = objective({"student": student}, {"teacher": teacher}, BATCH)
    require_silent(found, ["dskd_student_space", "dskd_teacher_space"], parts(objective, student))


@pytest.mark.parametrize("paired", [False, True])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient_in_the_second_version(paired: bool) -> None:
    student, teacher = network(5, TEACHER, IDS, 2, trained=True), network(5, TEACHER, IDS, 2)
    assert student.head is not None
    ours, batch, bridge, shared = student.head.weight, BATCH, None, None
    if paired:  # the same network under other ids, with three rows that are paired
        ids = torch.randperm(IDS)
        head = Head(ours.detach()[ids.argsort()])
        teacher = Signals(teacher.rows, head.logits, head)
        batch, bridge = {**BATCH, ALIGNED_PAIRS: torch.tensor([[0, 2, 3], [0, 2, 3]])}, AlignedRowMatcher()
        shared = torch.stack([torch.arange(IDS), ids])
    assert teacher.head is not None
    objective = DSKDv2(ours, teacher.head.weight, row_matcher=bridge, shared_token_ids=shared)
    torch.testing.assert_close(objective.to_student.detach(), torch.eye(TEACHER).double())
    found = objective({"student": student}, {"teacher": teacher}, batch)
    require_silent(found, ["dskdv2_student_space", "dskdv2_teacher_space"], parts(objective, student))


def test_the_way_to_the_teacher_follows_the_students_head() -> None:
    views, frozen = pair()
    objective = second(views, frozen)
    student, teacher = views["student"], frozen["teacher"]
    assert student.head is not None
    before = objective.compute_teacher_projection(student, teacher)
    optimiser = torch.optim.AdamW([student.head.weight], lr=0.1, fused=True)
    student.head.weight.sum().backward()
    optimiser.step()
    assert not torch.allclose(objective.compute_teacher_projection(student, teacher), before)


def aligned(views: dict[str, Signals], frozen: dict[str, Signals]) -> DSKDv2:
    student, teacher = views["student"].head, frozen["teacher"].head
    assert student is not None
    assert teacher is not None
    shared = torch.stack([torch.arange(IDS - 1), torch.arange(IDS - 1) + 2])  # of the student, of the teacher
    return DSKDv2(student.weight, teacher.weight, row_matcher=AlignedRowMatcher(), shared_token_ids=shared)


def test_aligned_rows_alone_are_compared() -> None:
    views, frozen = pair(crossed=True)
    objective = aligned(views, frozen)
    student, teacher = views["student"], frozen["teacher"]
    assert student.head is not None
    assert teacher.head is not None
    ours, theirs = CROSSED[ALIGNED_PAIRS]
    choice = teacher.logits(teacher.rows).argmax(1)[theirs] - 2
    kept = (choice >= 0) & (choice < IDS - 1)
    assert 0 < kept.sum() < 3, "the test wants a row whose likeliest token the student lacks"
    t2s = teacher.rows[theirs] @ objective.to_student @ student.head.weight.detach().mT
    agreed = kept & (t2s.argmax(1) == choice)
    back = student.rows[ours] @ objective.compute_teacher_projection(student, teacher) @ teacher.head.weight.mT
    found = objective(views, frozen, CROSSED)
    kd = forward_kl(t2s, student.logits(student.rows)[ours])
    torch.testing.assert_close(found["dskdv2_student_space"], (agreed * kd).sum())
    expected = cross_entropy(t2s[kept], choice[kept], reduction="sum")
    torch.testing.assert_close(found["dskdv2_projector"], expected)
    torch.testing.assert_close(
        found["dskdv2_teacher_space"], forward_kl(teacher.logits(teacher.rows)[theirs], back).sum()
    )
    assert set(objective.counts(CROSSED).values()) == {3}


def test_a_batch_without_a_pair_gives_zero_and_a_finite_gradient() -> None:
    views, frozen = pair(crossed=True)
    objective = aligned(views, frozen)
    found = objective(views, frozen, {**CROSSED, ALIGNED_PAIRS: torch.empty(2, 0, dtype=torch.long)})
    assert [value.item() for value in found.values()] == [0, 0, 0]
    sum(found.values(), torch.tensor(0.0)).backward()
    assert views["student"].rows.grad is not None
    assert views["student"].rows.grad.isfinite().all()


def test_it_shares_the_pass_over_the_head_with_cross_entropy() -> None:
    views, frozen = pair()
    objective = first()
    together = WeightedSum((0.4, CrossEntropy()), (0.6, objective))(views, frozen, BATCH)
    apart = {**CrossEntropy()(views, frozen, BATCH), **objective(views, frozen, BATCH)}
    of = parts(objective, views["student"])
    for name, value in apart.items():
        torch.testing.assert_close(together[name], value)
    loss = 0.4 * together["cross_entropy"] + 0.6 * sum(v for k, v in together.items() if k != "cross_entropy")
    expected = 0.4 * apart["cross_entropy"] + 0.6 * sum(v for k, v in apart.items() if k != "cross_entropy")
    for ours, theirs in zip(gradients(loss, of).values(), gradients(expected, of).values(), strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_a_teacher_without_a_head_is_refused() -> None:
    views, _ = pair()
    silent = {"teacher": Signals(torch.zeros(5, IDS), lambda rows: rows)}
    with pytest.raises(UnsupportedModel, match="teacher's head"):
        first()(views, silent, BATCH)


def test_what_the_student_wrote_itself_is_no_label_of_the_projector() -> None:
    views, frozen = pair()
    objective = first()
    sampled = torch.tensor([[False, True, True, False, False, False, False, False]])
    found = objective(views, frozen, {**BATCH, "sampled": sampled})["dskd_projector"]
    student, teacher = views["student"], frozen["teacher"]
    assert student.head is not None
    t2s = objective.to_student(teacher.rows) @ student.head.weight.mT
    kept = torch.tensor([True, False, False, True, True])
    torch.testing.assert_close(found, cross_entropy(t2s[kept], TARGETS[kept], reduction="sum"))
    assert objective.counts({**BATCH, "sampled": sampled})["dskd_projector"] == 3


def test_heads_that_scale_their_logits_are_projected_as_they_speak() -> None:
    views, frozen = pair()
    mine, yours = views["student"], frozen["teacher"]
    assert mine.head is not None
    assert yours.head is not None
    heads = mine.head._replace(scale=0.25), yours.head._replace(scale=2.0)
    student, teacher = (Signals(s.rows, h.logits, h) for s, h in zip((mine, yours), heads, strict=True))
    objective = DSKDv2(heads[0].weight, heads[1].weight, logit_scale_ratio=8.0)
    wanted, head = teacher.logits(teacher.rows), 0.25 * heads[0].weight.detach()
    nearest = torch.linalg.lstsq(head, wanted.mT).solution.mT @ head.mT
    torch.testing.assert_close(heads[0].logits(teacher.rows @ objective.to_student).detach(), nearest)
    back = heads[1].logits(student.rows @ objective.compute_teacher_projection(student, teacher)).detach()
    said, head = heads[0].logits(student.rows).detach(), 2.0 * heads[1].weight
    torch.testing.assert_close(back, torch.linalg.lstsq(head, said.mT).solution.mT @ head.mT)
