"""Methods between two tokenizers: every one of them on the same laws, then each against its definition."""

import copy
from collections.abc import Mapping

import pytest
import torch
from tests.data.trained import byte_level, sentencepiece
from tests.objectives.crossed import TEXTS, batch_of, llama, taught
from tests.objectives.enumerated import ACROSS_METHODS as ACROSS
from tests.objectives.test_invariants import assert_equal, gradients
from torch import Tensor
from transformers import LlamaForCausalLM

from potstill.core.types import (
    ALIGNED_GROUPS,
    ALIGNED_PAIRS,
    EDIT_ALIGNED_PAIRS,
    Head,
    Signals,
    get_view,
    supervised_positions,
)
from potstill.models.signals import compute_signals
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.mined import MIN_LOGIT, MinED, make_student_vocab_logits_fn
from potstill.objectives.model_info import ModelInfo, PairInfo
from potstill.objectives.row_terms import RowObjective, RowTerm
from potstill.objectives.spans import Spans, compute_log_likelihoods
from potstill.objectives.uld import ULD
from potstill.ops.divergence import forward_kl
from potstill.ops.fused import sum_row_losses, sum_row_losses_densely
from potstill.ops.likelihood import binary_kl
from potstill.ops.uld import uld_by_sorting
from potstill.train.training_module import TrainingModule

OURS, THEIRS = byte_level(330), sentencepiece()


@pytest.fixture(scope="module")
def pair() -> PairInfo:
    return PairInfo(ModelInfo(llama(OURS, 32, 1), OURS), ModelInfo(llama(THEIRS, 48, 2), THEIRS))


def study_of(sides: PairInfo, name: str) -> TrainingModule:
    torch.manual_seed(0)
    objective = ObjectiveConfig.parse(name, cross_entropy=0.0, temperature=1.5).build(sides)
    assert isinstance(objective, torch.nn.Module)
    ids = {"student": sides.student.vocab_size, "teacher": sides.teacher.vocab_size}
    student, teacher = copy.deepcopy(sides.student.model), sides.teacher.model
    assert isinstance(teacher, LlamaForCausalLM)
    return TrainingModule(student, objective.double(), frozen={"teacher": teacher}, vocabulary=ids)


def read(sides: PairInfo, batch: Mapping[str, Tensor]) -> tuple[Signals, Signals]:
    """Student, trained, and teacher, frozen, at their supervised rows."""
    found = []
    for side, name in ((sides.student, "student"), (sides.teacher, "teacher")):
        objective = ULD()
        needs = objective.needs(batch)[name]
        with torch.no_grad():
            found.append(compute_signals(side.model, get_view(batch, name), needs, vocabulary=side.vocab_size))
    student = found[0]
    assert student.head is not None
    rows, weight = student.rows.requires_grad_(), student.head.weight.detach().clone().requires_grad_()
    head = student.head._replace(weight=weight)
    return Signals(rows, head.logits, head), found[1]


@pytest.mark.parametrize("name", ACROSS)
def test_a_method_trains_the_student_and_its_own_weights_and_never_the_teacher(name: str, pair: PairInfo) -> None:
    study = study_of(pair, name)
    found = gradients(study, batch_of(TEXTS, OURS, THEIRS))
    own = {key for key, _ in study.named_parameters() if key.startswith("objective.")}
    assert own <= found.keys()
    assert all(found[key].any() for key in own)
    assert any(g.any() for key, g in found.items() if key.startswith("student."))
    assert all(g.isfinite().all() for g in found.values())
    assert all(p.grad is None for p in pair.teacher.model.parameters())


@pytest.mark.parametrize("name", ACROSS)
def test_a_method_gives_documents_together_what_it_gives_them_apart(name: str, pair: PairInfo) -> None:
    whole, parts = batch_of(TEXTS, OURS, THEIRS), [batch_of([text], OURS, THEIRS) for text in TEXTS]
    study = taught(study_of(pair, name), whole)
    counts = study.counts(whole)
    assert torch.equal(counts, sum((study.counts(part) for part in parts), torch.zeros_like(counts)))
    together = gradients(study, whole, counts)
    apart: dict[str, Tensor] = {}
    for part in parts:
        for key, g in gradients(study, part, counts).items():
            apart[key] = apart.get(key, torch.zeros_like(g)) + g
    assert_equal(together, apart)


@pytest.mark.parametrize("name", ACROSS)
def test_a_batch_in_which_nothing_belongs_together_is_finite(name: str, pair: PairInfo) -> None:
    study, batch = study_of(pair, name), batch_of(TEXTS[:1], OURS, THEIRS)
    nothing = torch.empty(2, 0, dtype=torch.long)
    batch |= {ALIGNED_PAIRS: nothing, EDIT_ALIGNED_PAIRS: nothing}
    batch |= {key: torch.full_like(batch[key], -1) for key in ALIGNED_GROUPS}
    assert all(g.isfinite().all() for g in gradients(study, batch).values())


ROWS = [name for name in ACROSS if name in ("uld", "mined", "spans")]


@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize("name", ROWS)
def test_fused_is_plain_in_value_and_every_gradient(name: str, chunk: int, pair: PairInfo) -> None:
    batch = batch_of(TEXTS, OURS, THEIRS)
    student, teacher = read(pair, batch)
    objective = study_of(pair, name).objective.parts[0][1]
    assert isinstance(objective, RowObjective)
    terms, others = objective.split({"student": student}, {"teacher": teacher}, batch)
    assert not others
    found, expected = (by(terms, student, supervised_positions(batch)[1], chunk) for by in (fused, definition))
    assert_equal(found, expected)


def definition(terms: Mapping[str, RowTerm], student: Signals, targets: Tensor, chunk: int) -> dict[str, Tensor]:
    assert student.head is not None
    said = {name: telling for term in terms.values() for name, telling in term.inputs.items()}
    losses = [term.loss for term in terms.values()]
    return with_gradients(
        terms, student, sum_row_losses_densely(losses, student.rows, student.head, targets=targets, frozen=said)
    )


def fused(terms: Mapping[str, RowTerm], student: Signals, targets: Tensor, chunk: int) -> dict[str, Tensor]:
    assert student.head is not None
    said = {name: telling for term in terms.values() for name, telling in term.inputs.items()}
    losses, mix = [term.loss for term in terms.values()], [1.0] * len(terms)
    found = sum_row_losses(losses, student.rows, student.head, targets=targets, frozen=said, mix=mix, chunk=chunk)
    return with_gradients(terms, student, found)


def with_gradients(terms: Mapping[str, RowTerm], student: Signals, values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    assert student.head is not None
    found = torch.autograd.grad(sum(values, torch.tensor(0.0)), (student.rows, student.head.weight))
    return {**dict(zip(terms, values, strict=True)), "rows": found[0], "head": found[1]}


def renamed_batch(batch: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """What a teacher with the same tokens under other ids reads, with every row beside itself."""
    rows = len(supervised_positions(batch)[1])
    every = torch.arange(rows)
    labels = torch.where(batch["labels"] >= 0, ids[batch["labels"].clamp(min=0)], batch["labels"])
    others = {**batch, "input_ids": ids[batch["input_ids"]], "labels": labels}
    both = every.expand(2, -1)
    return {
        **batch,
        ALIGNED_PAIRS: both,
        EDIT_ALIGNED_PAIRS: both,
        **dict.fromkeys(ALIGNED_GROUPS, every),
        **{f"teacher.{key}": tensor for key, tensor in others.items()},
    }


@pytest.mark.parametrize("name", ["mined", "spans"])
def test_one_vocabulary_under_other_ids_gives_the_loss_and_gradient_of_plain_distillation(
    name: str, pair: PairInfo
) -> None:
    ids = torch.randperm(pair.student.vocab_size)  # the teacher's id of each of the student's
    same = PairInfo(pair.student, ModelInfo(llama(OURS, 48, 5), OURS))
    batch = {key: t for key, t in batch_of(TEXTS, OURS, OURS).items() if "." not in key}
    student, teacher = read(same, batch)
    back = ids.argsort()
    head = teacher.head
    assert head is not None
    other = head._replace(weight=head.weight[back])
    renamed = Signals(teacher.rows, other.logits, other)
    objective = (
        MinED(back, len(ids), temperature=1.5)
        if name == "mined"
        else Spans(torch.stack([torch.arange(len(ids)), ids]), (len(ids), len(ids)), temperature=1.5)
    )
    of = (student.rows, student.head.weight) if student.head else ()
    found = sum(
        objective({"student": student}, {"teacher": renamed}, renamed_batch(batch, ids)).values(), torch.tensor(0.0)
    )
    expected = LogitDistillation(temperature=1.5)({"student": student}, {"teacher": teacher}, batch)["distill"]
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, of), torch.autograd.grad(expected, of), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sorted_gaps_pair_the_rows_of_a_document_by_their_place(pair: PairInfo) -> None:
    batch = batch_of(TEXTS, OURS, THEIRS)
    student, teacher = read(pair, batch)
    ours, theirs = supervised_positions(batch)[2], supervised_positions(get_view(batch, "teacher"))[2]
    p, q = (one.logits(one.rows).softmax(-1) for one in (teacher, student))
    expected, pairs = torch.tensor(0.0).double(), 0
    for document in range(len(TEXTS)):
        mine, yours = q[ours == document], p[theirs == document]
        n = min(len(mine), len(yours))
        expected, pairs = expected + uld_by_sorting(yours[:n], mine[:n]).sum(), pairs + n
    found = ULD()({"student": student}, {"teacher": teacher}, batch)["uld"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert ULD().counts(batch) == {"uld": pairs}
    assert pairs < max(len(ours), len(theirs)), "the test wants rows without a partner"


def test_runs_are_compared_by_their_likelihood_and_shared_tokens_by_their_distribution(pair: PairInfo) -> None:
    batch = batch_of(TEXTS, OURS, THEIRS)
    student, teacher = read(pair, batch)
    shared = pair.shared_token_ids
    objective = Spans(shared, pair.vocab_sizes)
    found = objective({"student": student}, {"teacher": teacher}, batch)
    log_q, log_p = (one.logits(one.rows).log_softmax(-1) for one in (student, teacher))
    targets, labels = supervised_positions(batch)[1], supervised_positions(get_view(batch, "teacher"))[1]
    tokens, runs, kinds = torch.tensor(0.0).double(), torch.tensor(0.0).double(), [0, 0]
    for group in range(int(batch[ALIGNED_GROUPS[0]].max()) + 1):
        mine, yours = (batch[key] == group for key in ALIGNED_GROUPS)
        alike = (shared == torch.tensor([[targets[mine][0]], [labels[yours][0]]])).all(0).any()
        if mine.sum() == yours.sum() == 1 and alike:
            both = []
            for logs, ids in ((log_p[yours][0], shared[1]), (log_q[mine][0], shared[0])):
                rest = torch.ones(len(logs), dtype=torch.bool)
                rest[ids] = False
                both.append(torch.cat([logs[ids], logs[rest].logsumexp(0)[None]])[None])
            tokens, kinds[0] = tokens + forward_kl(*both)[0], kinds[0] + 1
        else:
            both = [logs[rows, wanted[rows]].sum() for logs, rows, wanted in
                    ((log_p, yours, labels), (log_q, mine, targets))]  # fmt: skip
            runs, kinds[1] = runs + binary_kl(both[0][None], both[1][None])[0], kinds[1] + 1
    assert min(kinds) > 0, "the test wants both kinds"
    torch.testing.assert_close(found["spans_tokens"], tokens)
    torch.testing.assert_close(found["spans_runs"], runs)
    assert set(objective.counts(batch).values()) == {sum(kinds)}
    of = (student.rows, student.head.weight) if student.head else ()
    for ours, theirs in zip(
        torch.autograd.grad(sum(found.values(), torch.tensor(0.0)), of),
        torch.autograd.grad(tokens + runs, of),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_rows_that_are_not_aligned_learn_the_text_and_the_others_the_teacher(pair: PairInfo) -> None:
    batch = batch_of(TEXTS, OURS, THEIRS)
    student, teacher = read(pair, batch)
    objective = MinED(pair.nearest_ids, pair.student.vocab_size)
    partner, targets = objective.find_partners(batch), supervised_positions(batch)[1]
    assert 0 < (partner >= 0).sum() < len(partner)
    log_q, expected = student.logits(student.rows).log_softmax(-1), torch.tensor(0.0).double()
    for n, m in enumerate(partner.tolist()):
        if m < 0:
            expected = expected - log_q[n, targets[n]]
            continue
        p = torch.full((pair.student.vocab_size,), -torch.inf).double()
        for i, logit in reversed(list(enumerate(teacher.logits(teacher.rows[m : m + 1])[0]))):
            if pair.nearest_ids[i] >= 0:
                p[pair.nearest_ids[i]] = logit  # the first of several is written last
        expected = expected + forward_kl(p[None], log_q[n : n + 1])[0]
    found = objective({"student": student}, {"teacher": teacher}, batch)["mined"]
    torch.testing.assert_close(found, expected)


def test_the_students_ids_alone_are_asked_of_a_head_as_of_all_its_ids() -> None:
    torch.manual_seed(0)
    rows, source = torch.randn(5, 8).double(), torch.tensor([3, -1, 0, 6])
    head = Head(torch.randn(7, 8).double(), torch.randn(7).double(), 0.5, 3.0)
    by_head, by_logits = (
        make_student_vocab_logits_fn(source, Signals(rows, head.logits, one))(rows) for one in (head, None)
    )
    expected = head.logits(rows)[:, [3, 0, 0, 6]]
    expected[:, 1] = MIN_LOGIT
    for found in (by_head, by_logits):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_likelihoods_belong_to_their_rows_wherever_these_are_cut(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.objectives.spans.ROWS_PER_CHUNK", 3)
    monkeypatch.setattr("potstill.ops.fused.BLOCK", 2 * 11)  # two rows
    logits, numbers, targets = torch.randn(9, 11), torch.randperm(9)[:rows], torch.randint(0, 11, (rows,))
    found = compute_log_likelihoods(Signals(torch.arange(9), lambda places: logits[places]), numbers, targets)
    torch.testing.assert_close(found, logits.log_softmax(-1)[numbers, targets])


@pytest.mark.parametrize("width", [5, 6, 8])  # a head may have fewer rows than its tokenizer has ids, or more
def test_shared_tokens_and_all_others_are_what_the_head_gives_them(width: int) -> None:
    shared, objective = torch.tensor([0, 2]), Spans(torch.tensor([[0, 1], [0, 2]]), (3, 6))
    logits = torch.randn(4, width, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        log_p, log_rest = objective._coarsen_logits(logits, shared)
    p = logits.softmax(-1)
    torch.testing.assert_close(log_p.exp(), p[:, shared])
    torch.testing.assert_close(log_rest.exp()[:, 0], 1 - p[:, shared].sum(-1))
    logits[0, 2], logits[1, 3:] = -torch.inf, -torch.inf  # a shared token and all others that the teacher never says
    log_p, log_rest = objective._coarsen_logits(logits, shared)
    assert log_p.isfinite().all()
    assert log_rest.isfinite().all()


def test_own_tokens_decide_which_rows_of_a_path_are_aligned(pair: PairInfo) -> None:
    batch = batch_of(TEXTS, OURS, THEIRS)
    partner = MinED(pair.nearest_ids, pair.student.vocab_size).find_partners(batch)
    own, other = (
        get_view(batch, name)["input_ids"][supervised_positions(get_view(batch, name))[0]]
        for name in ("student", "teacher")
    )
    on_path = dict(batch[EDIT_ALIGNED_PAIRS].T.tolist())
    for n, m in enumerate(partner.tolist()):
        reached = on_path.get(n, -1)
        assert m == (reached if reached >= 0 and pair.nearest_ids[other[reached]] == own[n] else -1)


def test_what_ends_a_text_is_nearest_to_what_ends_it_for_the_other(pair: PairInfo) -> None:
    assert pair.nearest_ids[THEIRS.eos_token_id] == OURS.eos_token_id
    assert [OURS.eos_token_id, THEIRS.eos_token_id] in pair.shared_token_ids.T.tolist()
    assert (pair.nearest_ids[THEIRS.bos_token_id]) == -1
