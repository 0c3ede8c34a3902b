"""Numbers by hand that stand nowhere else: parts of adaptive KL and TIE-KD, soft targets, exact alignment."""

import pytest
import torch
from tests.data.trained import byte_level, unigram
from torch import Tensor

from potstill.data.cross_tokenizer.packs import TokenizerInfo, translate_windows
from potstill.ops.align import match_spans
from potstill.ops.divergence import adaptive_kl, apply_temperature, forward_kl, reverse_kl, total_variation
from potstill.ops.ranking import hierarchical_ranking_loss


def double(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


TEACHER, STUDENT = double([2, 1, 0, -1]), double([0, 1, 0.5, -2])


@pytest.mark.parametrize(("tau", "head", "tail"), [(1.0, 0.462173, 0.477099), (2.0, 0.329893, 0.147157)])
def test_adaptive_kl_weighs_by_the_gaps_of_head_and_tail(tau: float, head: float, tail: float) -> None:
    """AKL = (g_head FKL + g_tail RKL) / (g_head + g_tail), and both gaps together are twice the total variation."""
    both = TEACHER / tau, STUDENT / tau
    forward, reverse, gaps = forward_kl(*both), reverse_kl(*both), 2 * total_variation(*both)
    share = (adaptive_kl(*both) - reverse) / (forward - reverse)
    assert (share * gaps).item() == pytest.approx(head, abs=6e-7)
    assert ((1 - share) * gaps).item() == pytest.approx(tail, abs=6e-7)


def test_the_ranking_loss_is_its_two_parts_in_value_and_gradient() -> None:
    p, q = TEACHER.softmax(-1), STUDENT.softmax(-1).requires_grad_()
    (ours, theirs), z = ([0, 1], [1, 2]), q[0]
    top = torch.stack([z[i] - z[0] for i in ours]).clamp(min=0).sum()
    other = torch.stack([z[j] - z[i] for i in ours for j in theirs if p[0, i] > p[0, j]]).clamp(min=0).sum()
    found = hierarchical_ranking_loss(p, q, k=2)
    for value, expected in ((top, 0.312282), (other, 0.430181), (found, 0.312282 + 0.430181)):
        assert value.item() == pytest.approx(expected, abs=1.2e-6)
    assert torch.autograd.grad(top, q, retain_graph=True)[0].tolist() == [[-1, 1, 0, 0]]
    assert torch.autograd.grad(other, q, retain_graph=True)[0].tolist() == [[-2, 1, 1, 0]]
    assert torch.autograd.grad(found.sum(), q)[0].tolist() == [[-3, 2, 1, 0]]


@pytest.mark.parametrize(
    ("tau", "divergence", "entropy", "crossed"),
    [(1.0, 0.379738, 0.524267, 0.904005), (2.0, 0.122183, 0.905959, 1.028142)],
)
def test_forward_kl_is_soft_cross_entropy_without_the_teachers_entropy(
    tau: float, divergence: float, entropy: float, crossed: float
) -> None:
    teacher, student = double([2, 0, -1]), double([1, 1, 0])
    p = (teacher / tau).softmax(-1)
    assert -(p * p.log()).sum().item() == pytest.approx(entropy, abs=6e-7)
    assert forward_kl(teacher / tau, student / tau).item() == pytest.approx(divergence, abs=6e-7)
    assert divergence + entropy == pytest.approx(crossed, abs=1.2e-6)
    assert apply_temperature(forward_kl, tau)(teacher, student).item() == pytest.approx(tau**2 * divergence, abs=3e-6)


def test_tokens_behind_different_strings_for_the_same_bytes_are_paired() -> None:
    """[x, yz] beside [q, yz]. Departs from the released code, in which yz is lost with all that follows it.

    There prefixes are compared as strings, and once they differ at one length they differ for ever. Here a token is
    the bytes that it stands for in one text: x and q are paired where they are two spellings of those bytes (a byte
    fallback), are not where one side has no span for them (it rewrote them), and yz is paired with yz in both cases.
    """
    spelt = torch.tensor([[0, 1], [1, 3]])
    assert match_spans(spelt, spelt).tolist() == [[0, 0], [1, 1]]
    rewritten = torch.tensor([[0, 0], [1, 3]])
    assert match_spans(rewritten, spelt).tolist() == match_spans(spelt, rewritten).tolist() == [[1, 1]]


def test_a_token_that_the_teacher_does_not_know_costs_itself_and_none_behind_it() -> None:
    student, teacher = TokenizerInfo.from_tokenizer(byte_level()), TokenizerInfo.from_tokenizer(unigram())
    ids = student.tokenizer("🐙dog.", add_special_tokens=False, return_tensors="pt").input_ids[0]
    (found,) = translate_windows([(ids, ids)], student, teacher)
    assert teacher.tokenizer.unk_token_id in found.input_ids.tolist()
    pairs = [
        (student.pieces.by_id[ids[i]], teacher.pieces.by_id[found.input_ids[j]]) for i, j in found.equal_tokens.tolist()
    ]
    assert pairs
    assert all(ours == theirs for ours, theirs in pairs)
    assert b"".join(ours for ours, _ in pairs).endswith(b".")
