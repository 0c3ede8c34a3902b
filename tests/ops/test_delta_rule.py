"""The chunked delta rule is its recurrence in value and every gradient; and the recurrence does what it claims."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import normalize
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from potstill.ops import delta_rule as module
from potstill.ops.delta_rule import chunked, recurrent
from potstill.ops.delta_rule_forms import SHORT, delta_rule

NAMES = ("q", "k", "v", "beta", "state", "gate")
GATED = pytest.mark.parametrize("gated", [True, False])


def inputs(
    length: int = 23, *, batch: int = 2, width: int = 4, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Three heads of 4 by 5; `beta` up to 2."""
    heads = (batch, length, 3)
    values = {
        "q": torch.randn(*heads, width, dtype=dtype),
        "k": normalize(torch.randn(*heads, width, dtype=dtype), dim=-1),
        "v": torch.randn(*heads, 5, dtype=dtype),
        "beta": 2 * torch.rand(*heads, dtype=dtype),
        "state": torch.randn(batch, 3, width, 5, dtype=dtype),
        "gate": -2 * torch.rand(*heads, dtype=dtype),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def ungated(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if name != "gate"}


def results(function: Any, values: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Outputs, last memory, and every gradient of a random sum of both."""
    torch.manual_seed(1)
    outputs = function(**values, **options)
    total = sum((out * torch.randn(out.shape, dtype=out.dtype).to(out.device)).sum() for out in outputs)
    return [*outputs, *torch.autograd.grad(total, [values[name] for name in NAMES if name in values])]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@GATED
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 16, 23])
def test_chunks_are_the_recurrence_in_value_and_every_gradient(
    gated: bool, packed: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPAN", 8)
    values = inputs() if gated else ungated(inputs())
    starts = torch.rand(2, 23) < 0.2 if packed else None
    ours = results(chunked, values, starts=starts, chunk=chunk)
    assert_equal(ours, results(recurrent, values, starts=starts))


@GATED
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_any_length_will_do_without_a_state(gated: bool, length: int) -> None:
    values = inputs(length) if gated else ungated(inputs(length))
    del values["state"]
    assert_equal(results(chunked, values, chunk=4, scale=0.3), results(recurrent, values, scale=0.3))


@GATED
@pytest.mark.parametrize("cut", [1, 4, 10, 22])
def test_a_text_cut_anywhere_is_the_whole_in_value_and_every_gradient(gated: bool, cut: int) -> None:
    values = inputs() if gated else ungated(inputs())

    def in_pieces(state: Tensor, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for a, b in pairwise((0, cut, 23)):
            y, state = chunked(**{name: x[:, a:b] for name, x in tokens.items()}, state=state, chunk=4)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    assert_equal(results(in_pieces, values), results(chunked, values, chunk=4))


@GATED
def test_finite_differences_agree(gated: bool) -> None:
    values = inputs(5, batch=1, width=2)
    names = [name for name in NAMES if gated or name != "gate"]
    leaves = [values[name] for name in names]
    starts = torch.arange(5)[None] == 3
    assert torch.autograd.gradcheck(
        lambda *tensors: chunked(**dict(zip(names, tensors, strict=True)), starts=starts, chunk=2), leaves, atol=1e-6
    )


def test_packed_documents_are_the_documents_alone() -> None:
    values, lengths = ungated(inputs(batch=1)), [1, 9, 4, 4, 5]
    starts = torch.cat([torch.arange(n) == 0 for n in lengths])[None]
    packed, memory = chunked(**values, starts=starts, chunk=4)
    pieces = {name: x.split(lengths, 1) for name, x in values.items() if name != "state"}
    alone = [recurrent(**{name: x[i] for name, x in pieces.items()}) for i in range(len(lengths))]
    torch.testing.assert_close(packed, torch.cat([y for y, _ in alone], 1))
    torch.testing.assert_close(memory, alone[-1][1])


def test_a_document_keeps_its_bits_when_another_changes() -> None:
    values = inputs(batch=1, dtype=torch.float32)
    starts = (torch.arange(23) % 13 == 0)[None]
    new = inputs(batch=1, dtype=torch.float32)
    other = {name: x if name == "state" else torch.cat([new[name][:, :13], x[:, 13:]], 1) for name, x in values.items()}
    for a, b in zip(chunked(**values, starts=starts, chunk=8), chunked(**other, starts=starts, chunk=8), strict=True):
        assert torch.equal(a[:, 13:] if a.ndim == 4 and a.shape[1] == 23 else a, b[:, 13:] if b.shape[1] == 23 else b)


def test_numbers_by_hand() -> None:
    k = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).view(1, 2, 1, 2)
    v, beta = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1), torch.tensor([0.5, 1.0]).view(1, 2, 1)
    y, state = recurrent(k, k, v, beta, scale=1.0)
    # S_1 = 0.5 * 2 * (1, 0) = (1, 0); it predicts 0.6 for the second key, whose error is 0.4
    torch.testing.assert_close(y.flatten(), torch.tensor([1.0, 0.6 + 0.4]))
    torch.testing.assert_close(state.flatten(), torch.tensor([1.0 + 0.4 * 0.6, 0.4 * 0.8]))
    y, state = recurrent(k, k, v, beta, scale=1.0, gate=torch.tensor([-5.0, 0.5]).log_().nan_to_num_(-9).view(1, 2, 1))
    # the memory halves to (0.5, 0) before the second key, which then reads 0.3: the error is 0.7
    torch.testing.assert_close(state.flatten(), torch.tensor([0.5 + 0.7 * 0.6, 0.7 * 0.8]))


def test_without_a_rate_the_memory_stays() -> None:
    values = ungated(inputs())
    assert torch.equal(chunked(**values | {"beta": torch.zeros(2, 23, 3).double()})[1], values["state"])


def test_orthonormal_keys_are_recalled_exactly_and_a_key_written_again_has_its_new_value() -> None:
    values = ungated(inputs(5, batch=1)) | {"beta": torch.ones(1, 5, 3).double()}
    keys = torch.linalg.qr(torch.randn(3, 4, 4, dtype=torch.float64))[0].transpose(0, 1)[None]
    values["k"] = torch.cat([keys, keys[:, :1]], 1)
    values["v"] = v = torch.randn(1, 5, 3, 5, dtype=torch.float64)
    _, memory = chunked(**values, chunk=2)
    read = torch.einsum("bhkv,bthk->bthv", memory, values["k"])
    torch.testing.assert_close(read, torch.cat([v[:, 4:], v[:, 1:]], 1))


def test_no_output_depends_on_a_later_token() -> None:
    values = inputs()
    gradients = torch.autograd.grad(chunked(**values, chunk=4)[0][:, 9].sum(), [values[name] for name in NAMES])
    for name, gradient in zip(NAMES, gradients, strict=True):
        if name != "state":
            assert not gradient[:, 10:].any()
            assert gradient[:, :9].any() == (name != "q")


def test_a_gate_of_zero_is_no_gate() -> None:
    values = inputs()
    expected = chunked(**ungated(values))
    for a, b in zip(chunked(**values | {"gate": torch.zeros(2, 23, 3).double()}), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_with_orthonormal_keys_a_gate_makes_decayed_linear_attention() -> None:
    values = inputs(4, batch=1)
    values["k"] = torch.linalg.qr(torch.randn(3, 4, 4, dtype=torch.float64))[0].transpose(0, 1)[None]
    values["state"] = torch.zeros(1, 3, 4, 5).double()
    logs = values["gate"].cumsum(1)
    decay = (logs[:, :, None] - logs[:, None]).exp() * torch.ones(4, 4).tril()[None, ..., None]
    scores = 0.5 * torch.einsum("bihk,bjhk->bijh", values["q"], values["k"]) * decay * values["beta"][:, None]
    torch.testing.assert_close(chunked(**values)[0], torch.einsum("bijh,bjhv->bihv", scores, values["v"]))


def test_the_explicit_matrix_of_attention_is_the_recurrence() -> None:
    values = ungated(inputs(batch=1))
    q, k, v = (values[name].transpose(1, 2) for name in "qkv")
    beta, identity = values["beta"].transpose(1, 2)[..., None], torch.eye(23).double()
    attention = (q @ k.mT).tril() @ torch.linalg.inv(identity + (beta * (k @ k.mT)).tril(-1)) @ (beta * identity)
    del values["state"]
    torch.testing.assert_close(recurrent(**values, scale=1.0)[0], (attention @ v).transpose(1, 2))


def test_transformers_computes_the_same() -> None:
    values = {name: value.detach() for name, value in inputs(70, dtype=torch.float32).items()}
    named = {
        {"q": "query", "k": "key", "v": "value", "gate": "g", "state": "initial_state"}.get(n, n): x
        for n, x in values.items()
    }
    expected = torch_chunk_gated_delta_rule(**named, output_final_state=True)
    for a, b in zip(chunked(**values), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("gate", [None, -20.0])
def test_equal_keys_and_strong_gates_lose_few_digits_in_float32(gate: float | None) -> None:
    values = {name: value.detach() for name, value in ungated(inputs(64)).items()}
    values["k"] = values["k"][:, :1].expand(-1, 64, -1, -1)
    values["beta"] = values["beta"] / 2
    if gate is not None:
        values["gate"] = torch.where(torch.rand(2, 64, 3) < 0.2, gate, -1e-3).double()
    single = {name: value.float() for name, value in values.items()}
    for a, b in zip(chunked(**single, chunk=64), recurrent(**values), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5e-5)


def test_half_precision_is_computed_in_float32_under_autocast_too() -> None:
    halves = {name: value.detach().bfloat16() for name, value in inputs(40).items()}
    singles = {name: value.float() for name, value in halves.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, memory = chunked(**halves)
    expected, last = chunked(**singles)
    assert (y.dtype, memory.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(memory, last)
    assert torch.equal(y, expected.bfloat16())


def test_the_backward_stores_its_inputs_and_one_memory_for_each_span() -> None:
    values, saved = inputs(3 * module.SPAN, batch=1), list[int]()
    with saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        chunked(**values)
    tokens = sum(x.numel() for name, x in values.items() if name != "state")
    assert sum(saved) == tokens + 3 * values["state"].numel()


def test_the_length_chooses_the_form() -> None:
    for length in (1, SHORT, SHORT + 1):
        values = inputs(length)
        for a, b in zip(delta_rule(**values), recurrent(**values), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.gpu
@GATED
def test_the_kernels_of_flash_linear_attention_compute_the_same(gated: bool) -> None:
    pytest.importorskip("fla")
    values = (
        inputs(300, width=64, dtype=torch.float32) if gated else ungated(inputs(300, width=64, dtype=torch.float32))
    )
    values["v"] = torch.randn(2, 300, 3, 64).requires_grad_()
    values["state"] = torch.randn(2, 3, 64, 64).requires_grad_()
    starts = torch.rand(2, 300) < 0.02
    halves = {name: x if name == "state" else x.bfloat16() for name, x in values.items()}
    fast = {name: x.detach().cuda().requires_grad_() for name, x in halves.items()}
    slow = {name: x.detach().float().requires_grad_() for name, x in halves.items()}
    for a, b in zip(
        results(delta_rule, fast, starts=starts.cuda()), results(recurrent, slow, starts=starts), strict=True
    ):
        assert (a.cpu().float() - b.float()).norm() <= 0.01 * b.float().norm()
