"""Objectives with weights of their own: every gradient of student and projectors beside that of the plain definition.

A student in float64 throughout, documents of ragged lengths, heads with a bias and a scale. Each definition is written
with all logits at once, and goes through ordinary autograd.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from potstill.core.types import ALIGNED_PAIRS, IGNORE, Batch, Head, Objective, Signals, get_view, supervised_positions
from potstill.data.packing import collate
from potstill.objectives.attention_relations import AttentionRelations
from potstill.objectives.dskd import DSKD
from potstill.objectives.dskdv2 import DSKDv2
from potstill.objectives.dual_space import DualSpaceConfig
from potstill.objectives.hidden_states import HiddenStates
from potstill.objectives.row_matching import AlignedRowMatcher, CrossModelAttention
from potstill.ops.divergence import DIVERGENCES

WIDTHS = {"queries": 8, "keys": 4, "values": 4}
OURS, THEIRS = (13, 1, 22, 5), (8, 6, 1, 9)  # with documents in which one side or the other has no row
IDS, OTHER_IDS = 7, 11
TAU = 1.5


class Small(nn.Module):
    """Tokens to hidden states, layer by layer, in float64, with a head that has a bias and scales."""

    def __init__(self, ids: int, width: int, *, seed: int, scale: float) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.layers = nn.Embedding(ids, width), nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, ids)
        self.related = nn.ModuleList(nn.Linear(width, wide) for wide in WIDTHS.values())
        self.scale = scale
        self.double()

    def read(self, batch: Batch) -> Signals:
        positions, ids = supervised_positions(batch)[0], batch["input_ids"]
        state = self.embed(ids) * (1 + 0.1 * batch["position_ids"][..., None])
        layers = {0: state[positions]}
        for n, layer in enumerate(self.layers, 1):
            state = state + torch.tanh(layer(state))
            layers[n] = state[positions]
        head = Head(self.head.weight, self.head.bias, self.scale)
        relations = {name: own(state)[positions] for name, own in zip(WIDTHS, self.related, strict=True)}
        extras = {"embeddings": self.embed(torch.stack([ids[positions], ids.roll(-1, 1)[positions]], 1))}
        return Signals(layers[2], head.logits, head, layers=layers, relations=relations, extras=extras)


class Read(NamedTuple):
    """What both networks say, and the document of each row."""

    student: Signals
    teacher: Signals
    batch: Batch

    @property
    def targets(self) -> Tensor:
        return supervised_positions(self.batch)[1]

    @property
    def documents(self) -> tuple[Tensor, Tensor]:
        return supervised_positions(self.batch)[2], supervised_positions(get_view(self.batch, "teacher"))[2]

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        """Z_s and Z_t."""
        return self.student.logits(self.student.rows), self.teacher.logits(self.teacher.rows)

    def said(self, states: Tensor, by: str) -> Tensor:
        """The logits of `states` through the head of that network as a constant."""
        head = self.student.head if by == "student" else self.teacher.head
        assert head is not None
        assert head.bias is not None
        return head.scale * (states @ head.weight.detach().mT + head.bias.detach())


def batch_of(*, crossed: bool) -> Batch:
    torch.manual_seed(0)
    batch, other = (
        collate([{"input_ids": i, "labels": labelled(i), "lengths": torch.tensor([len(i)])} for i in documents])
        for documents in (
            [torch.randint(ids, (n,)) for n in lengths] for ids, lengths in ((IDS, OURS), (OTHER_IDS, THEIRS))
        )
    )
    if not crossed:
        return batch
    ours, theirs = (supervised_positions(side)[2] for side in (batch, other))
    pairs = [[(ours == d).nonzero()[:, 0][::2], (theirs == d).nonzero()[:, 0][1:]] for d in range(len(OURS))]
    both = torch.cat([torch.stack([a[: len(b)], b[: len(a)]]) for a, b in pairs], 1)
    return {**batch, ALIGNED_PAIRS: both, **{f"teacher.{key}": tensor for key, tensor in other.items()}}


def labelled(ids: Tensor) -> Tensor:
    return torch.where(torch.arange(len(ids)) < 1, IGNORE, ids)


# the definitions


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)) of each row."""
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)


def literal(divergence: str, teacher: Tensor, student: Tensor) -> Tensor:
    """tau^2 D of each row, no gradient for the teacher."""
    both = (teacher / TAU, student / TAU)
    return TAU**2 * (kl(*both) if divergence == "forward_kl" else kl(*both[::-1]))


def mixed(mask: Tensor) -> Tensor:
    assert 0 < mask.sum() < len(mask), "the test wants rows of either kind"
    return mask


def dskd(objective: DSKD, read: Read, divergence: str) -> list[Tensor]:
    ours, theirs = read.logits
    forth, back = objective.to_student, objective.to_teacher
    t2s = read.said(read.teacher.rows @ forth.weight.mT + forth.bias, "student")
    s2t = read.said(read.student.rows @ back.weight.mT + back.bias, "teacher")
    return [
        literal(divergence, t2s.detach(), ours).sum(),
        cross_entropy(t2s, read.targets, reduction="sum"),
        literal("forward_kl", theirs, s2t).sum(),
    ]


def dskd_cma(objective: DSKD, read: Read, divergence: str) -> list[Tensor]:
    assert isinstance(objective.bridge, CrossModelAttention)
    (ours, theirs), (mine, yours) = read.logits, read.documents
    e_s, e_t = (one.extras["embeddings"].detach().flatten(1) for one in (read.student, read.teacher))
    e_t = e_t / objective.bridge.embedding_std
    scores = objective.bridge.query(e_s) @ e_t.mT / math.sqrt(e_t.shape[1])
    scores = scores.masked_fill(mine[:, None] != yours, -torch.inf)
    there, back_there = torch.isin(mine, yours), torch.isin(yours, mine)  # rows with somebody to look at
    normal = read.teacher.rows / read.teacher.rows.std(1, keepdim=True)
    value = objective.to_student(normal + e_t[:, e_t.shape[1] // 2 :])
    t2s = read.said(scores[there].softmax(1) @ value, "student")
    s2t = read.said(scores[:, back_there].softmax(0).mT @ objective.to_teacher(read.student.rows), "teacher")
    right = mixed(t2s.argmax(1) == read.targets[there])
    return [
        (right * literal(divergence, t2s.detach(), ours[there])).sum(),
        cross_entropy(t2s, read.targets[there], reduction="sum"),
        literal("forward_kl", theirs[back_there], s2t).sum(),
    ]


def dskdv2(objective: DSKDv2, read: Read, divergence: str) -> list[Tensor]:
    rows = torch.arange(len(read.targets))
    return second(objective, read, divergence, (rows, rows), torch.arange(IDS).expand(2, -1))


def dskdv2_eta(objective: DSKDv2, read: Read, divergence: str) -> list[Tensor]:
    ours, theirs = read.batch[ALIGNED_PAIRS]
    return second(objective, read, divergence, (ours, theirs), SHARED)


def second(
    objective: DSKDv2, read: Read, divergence: str, pairs: tuple[Tensor, Tensor], shared: Tensor
) -> list[Tensor]:
    (mine, yours), (ours, theirs), (student, teacher) = pairs, read.logits, (read.student, read.teacher)
    assert student.head is not None
    assert teacher.head is not None
    heads = zip((student.head, teacher.head), shared, strict=True)
    w_s, w_t = (head.scale * head.weight.detach()[ids] for head, ids in heads)
    t2s = read.said(teacher.rows[yours] @ objective.to_student, "student")
    s2t = read.said(student.rows[mine] @ (w_s.mT @ torch.linalg.pinv(w_t.mT)), "teacher")
    known = dict(zip(shared[1].tolist(), shared[0].tolist(), strict=True))
    choice = torch.tensor([known.get(i, -1) for i in theirs[yours].argmax(1).tolist()])
    agreed, learnt = mixed(t2s.argmax(1) == choice), choice >= 0
    assert learnt.all() == (len(known) == theirs.shape[1]), "the test wants a choice that the student lacks"
    return [
        (agreed * literal(divergence, t2s.detach(), ours[mine])).sum(),
        cross_entropy(t2s[learnt], choice[learnt], reduction="sum"),
        literal(divergence, theirs[yours], s2t).sum(),
    ]


def hidden(objective: HiddenStates, read: Read, divergence: str) -> list[Tensor]:
    total = torch.zeros((), dtype=torch.float64)
    for (a, b), way in zip(objective.layers, objective.maps, strict=True):
        for n, m in read.batch.get(ALIGNED_PAIRS, torch.arange(len(read.targets)).expand(2, -1)).T.tolist():
            wanted = read.teacher.layers[b][m]
            total = total + (read.student.layers[a][n] @ way.weight.mT - wanted).norm() ** 2 / wanted.norm() ** 2
    return [total / len(objective.layers)]


def relations(objective: AttentionRelations, read: Read, divergence: str) -> list[Tensor]:
    ours, theirs = read.batch.get(ALIGNED_PAIRS, torch.arange(len(read.targets)).expand(2, -1))
    documents, total = read.documents[0][ours], torch.zeros((), dtype=torch.float64)
    unseen = (documents[:, None] != documents) | torch.ones(len(ours), len(ours)).triu(1).bool()
    for name, way in zip(WIDTHS, objective.maps, strict=True):
        both = read.teacher.relations[name][theirs], read.student.rows[ours] @ way.weight.mT
        for phi, psi in zip(*(x.chunk(objective.heads, 1) for x in both), strict=True):
            p, q = ((x @ x.mT / math.sqrt(x.shape[1])).masked_fill(unseen, -1e5) for x in (phi, psi))
            total = total + kl(p, q).sum() / objective.heads / len(WIDTHS)
    return [total]


class Case(NamedTuple):
    """How an objective is made, and what it is."""

    make: Callable[[Small, Small, DualSpaceConfig], Objective]
    definition: Callable[..., list[Tensor]]
    crossed: bool = False


SHARED = torch.tensor([[0, 1, 2, 4, 5, 6], [8, 1, 10, 0, 3, 5]])  # ids of student and teacher that are one string
CASES = {
    "dskd": Case(lambda s, t, how: DSKD(4, 6, how), dskd),
    "dskd_cma": Case(
        lambda s, t, how: DSKD(4, 6, how, CrossModelAttention(4, 6, embedding_std=0.7)), dskd_cma, crossed=True
    ),
    "dskdv2": Case(
        lambda s, t, how: DSKDv2(s.head.weight, t.head.weight, how, logit_scale_ratio=t.scale / s.scale), dskdv2
    ),
    "dskdv2_eta": Case(
        lambda s, t, how: DSKDv2(
            s.head.weight, t.head.weight, how, AlignedRowMatcher(), SHARED, logit_scale_ratio=t.scale / s.scale
        ),
        dskdv2_eta,
        crossed=True,
    ),
    "hidden": Case(lambda s, t, how: HiddenStates((4, 6), [(1, 0), (2, 2)]), hidden),
    "hidden between two tokenizers": Case(
        lambda s, t, how: HiddenStates((4, 6), [(1, 0), (2, 2)]), hidden, crossed=True
    ),
    "relations": Case(lambda s, t, how: AttentionRelations(4, WIDTHS, heads=2), relations),
    "relations between two tokenizers": Case(
        lambda s, t, how: AttentionRelations(4, WIDTHS, heads=2), relations, crossed=True
    ),
}
BY_DIVERGENCE = [
    (name, divergence)
    for name in CASES
    for divergence in (("forward_kl", "reverse_kl") if name.startswith("dskd") else ("forward_kl",))
]


def weights(*modules: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All of the student's and of the objective's own."""
    for name, module in zip(("student", "objective"), modules, strict=True):
        yield from ((f"{name}.{key}", weight) for key, weight in module.named_parameters())


def every_gradient(value: Tensor, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(of.values()), allow_unused=True, retain_graph=True)
    return {k: torch.zeros_like(of[k]) if g is None else g for k, g in zip(of, found, strict=True)}


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize(("name", "divergence"), BY_DIVERGENCE)
def test_each_term_and_its_every_gradient_are_those_of_the_definition(
    name: str, divergence: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.ops.fused.rows_per_chunk", lambda vocabulary: chunk)
    monkeypatch.setattr("potstill.ops.fused.BLOCK", 3 * IDS)
    case = CASES[name]
    batch = batch_of(crossed=case.crossed)
    student = Small(IDS, 4, seed=1, scale=0.5)
    teacher = Small(OTHER_IDS if case.crossed else IDS, 6, seed=2, scale=2.0)
    objective = case.make(student, teacher, DualSpaceConfig(divergence=DIVERGENCES[divergence], temperature=TAU))
    assert isinstance(objective, nn.Module)
    of = dict(weights(student, moved(objective)))
    with torch.no_grad():
        said = teacher.read(get_view(batch, "teacher"))
    read = Read(student.read(batch), said, batch)
    assert len(read.targets) > 32, "the test wants rows beyond those that are multiplied as they are"
    found = objective({"student": read.student}, {"teacher": said}, batch)
    expected = case.definition(objective, read, divergence)
    assert set(found) == set(objective.weights)
    moving = set()
    for term, literally in zip(objective.weights, expected, strict=True):
        torch.testing.assert_close(found[term], literally, rtol=1e-9, atol=0)
        ours, theirs = (every_gradient(value, of) for value in (found[term], literally))
        for key, gradient in theirs.items():
            torch.testing.assert_close(ours[key], gradient, rtol=1e-9, atol=1e-11, msg=f"{term}: {key}")
        moving |= {key for key, gradient in theirs.items() if gradient.any()}
    assert moving >= {key for key in of if key.startswith("objective.")}
    assert moving & {key for key in of if key.startswith("student.layers.0")}


def moved(objective: nn.Module) -> nn.Module:
    """In float64, away from where it starts."""
    with torch.no_grad():
        for weight in objective.double().parameters():
            weight += 0.1 * torch.randn_like(weight)
    return objective
