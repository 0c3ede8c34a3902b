"""A layer that tokens may skip, beside its definition: all tokens run, and keys and outputs are masked."""

from dataclasses import replace

import pytest
import tests.layers.extensions.gated_delta as gated_delta
import torch
from torch import Tensor

from potstill.core.blueprint import Blueprint, Layer, Rotary
from potstill.core.depth import EXECUTED, GATES, Depth
from potstill.core.depth_state import DepthState
from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.state import KeyValues, commit, record
from potstill.decode.generate import generate
from potstill.decode.reader_choice import choose_reader
from potstill.decode.sampling import Sampling
from potstill.decode.slot_reader import SlotReader
from potstill.layers.depth import DepthGate
from potstill.layers.ffn.experts import ROUTER_LOGITS, Experts
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.layers.positions import Positions
from potstill.models.backbone import Backbone, Block, init_weights
from potstill.models.families.registry import export_model
from potstill.models.signals import probe_model

PLAIN = Layer(Attention(4, 2, 4), SwiGLU(10))
WINDOWED = replace(PLAIN, mixer=Attention(4, 2, 4, window=4), post_norms=True)
PLAIN_ROTARY, DYNAMIC = Rotary(), Rotary(scaling=(("factor", 2.0), ("rope_type", "dynamic")))


def network(layer: Layer, depth: Depth | None, *, layers: int = 1, rotary: Rotary = PLAIN_ROTARY) -> Backbone:
    gated = replace(layer, depth=depth)
    model = Backbone(Blueprint(30, 12, (gated, layer) * layers, context=8, rotary=rotary)).double().eval()
    init_weights(model, std=0.4, rng=torch.Generator().manual_seed(1))
    return model


def text(*lengths: int) -> tuple[Tensor, Tensor]:
    return torch.randint(1, 30, (1, sum(lengths))), torch.cat([torch.arange(n) for n in lengths])[None]


def set_gate(model: Backbone, bias: float) -> None:
    """The same gate for every token."""
    gate = model.layers[0].depth.gate
    torch.nn.init.zeros_(gate.weight)
    torch.nn.init.constant_(gate.bias, bias)


def run_all_tokens(model: Backbone, x: Tensor, ids: Tensor) -> Tensor:
    """The definition: every token goes through the layer, and tokens that skip it are neither keys nor changed."""
    block = model.layers[0]
    assert isinstance(block, Block)
    assert isinstance(block.depth, DepthGate)
    gates, factors = block.depth.compute_gates(x)
    is_executed = gates >= block.depth.facts.threshold
    order, document = torch.arange(ids.shape[1]), (ids == 0).cumsum(1)
    is_visible = (order[:, None] >= order) & (document[:, :, None] == document[:, None]) & is_executed[:, None]
    is_visible = is_visible | torch.eye(ids.shape[1], dtype=torch.bool)
    distances = torch.where(is_visible, ids[:, :, None] - ids[:, None], -1)
    places = Positions(ids, model.blueprint.rotary, model.blueprint.context, distances=distances)
    mixed, _ = block._mix(x, places, None)
    update = mixed + block._feed(x + mixed, places)
    return torch.where(is_executed[..., None], x + factors[..., None] * update, x)


@pytest.mark.parametrize("rotary", [PLAIN_ROTARY, DYNAMIC])
@pytest.mark.parametrize("layer", [PLAIN, WINDOWED])
@pytest.mark.parametrize("depth", [Depth(), Depth(threshold=0.3, unit_logit=1.0), Depth(threshold=0.0)])
def test_gathered_tokens_give_the_definition_in_value_and_every_gradient(
    layer: Layer, depth: Depth, rotary: Rotary
) -> None:
    model, (_, ids) = network(layer, depth, rotary=rotary), text(9, 1, 14)
    block, weights = model.layers[0], list(model.layers[0].parameters())
    x = torch.randn(1, 24, 12).double().requires_grad_()
    share = (block.depth.compute_gates(x)[0] >= depth.threshold).double().mean().item()
    assert share == 1 if depth.threshold == 0 else 0.2 < share < 0.9
    outputs = block(x, model._make_positions(ids, None, None))[0], run_all_tokens(model, x, ids)
    weight = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad((y * weight).sum(), [x, *weights]) for y in outputs]
    for fast, definition in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        torch.testing.assert_close(fast, definition, rtol=1e-9, atol=1e-9)


def test_rows_and_padding_give_what_each_text_gives_alone() -> None:
    model = network(WINDOWED, Depth())
    rows = [text(length)[0] for length in (7, 12, 3)]
    ids = torch.cat([torch.nn.functional.pad(row, (0, 12 - row.shape[1])) for row in rows])
    for mask in (ids > 0, None):
        hidden = model(ids, torch.arange(12).expand(3, 12), token_mask=mask)
        for row, outputs in zip(rows, hidden, strict=True):
            expected = model(row, torch.arange(row.shape[1])[None])[0]
            torch.testing.assert_close(outputs[: row.shape[1]], expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_gate_of_1_leaves_the_layer_as_it_is_to_the_bit() -> None:
    (ids, places), plain = text(9, 4), network(PLAIN, None).float()
    for dtype in (torch.float32, torch.bfloat16):
        model = network(PLAIN, Depth(unit_logit=3.0)).to(dtype)
        model.load_state_dict(plain.state_dict(), strict=False)
        set_gate(model, 3.0)
        assert torch.equal(model(ids, places), plain.to(dtype)(ids, places))


@torch.no_grad()
def test_a_threshold_above_every_gate_is_the_identity_and_stores_nothing() -> None:
    model, (ids, places) = network(PLAIN, Depth(threshold=1.5)), text(6)
    x, states = torch.randn(1, 6, 12).double(), model.make_states()
    assert torch.equal(model.layers[0](x, model._make_positions(places, None, None))[0], x)
    model(ids, places, states)
    assert isinstance(states[0], DepthState)
    assert states[0].texts[0].state.get_seq_length() == 0
    assert states[0].get_seq_length() == states[1].get_seq_length() == 6


@torch.no_grad()
def test_the_output_is_linear_in_the_gate_that_scales_both_halves() -> None:
    model, x = network(PLAIN, Depth(threshold=0.0)), torch.randn(1, 5, 12).double()
    places = model._make_positions(torch.arange(5)[None], None, None)
    updates = []
    for bias in (-2.0, 0.0, 4.0):
        set_gate(model, bias)
        updates.append((model.layers[0](x, places)[0] - x) / torch.tensor(bias).double().sigmoid())
    for update in updates[1:]:
        torch.testing.assert_close(update, updates[0], rtol=1e-9, atol=1e-9)


def test_the_gate_is_the_sigmoid_of_the_normalized_input_whatever_its_size() -> None:
    gate = network(PLAIN, Depth(unit_logit=1.0)).layers[0].depth
    x = torch.randn(1, 3, 12).double() * torch.tensor([1.0, 50.0, 1e3]).double()[:, None]
    gates, factors = gate.compute_gates(x)
    for t in range(3):
        direction = x[0, t] / x[0, t].square().mean().sqrt()
        g = (gate.gate.weight[0] @ direction + gate.gate.bias[0]).sigmoid()
        torch.testing.assert_close(gates[0, t], g, rtol=1e-5, atol=0)
        torch.testing.assert_close(factors[0, t], g / torch.tensor(1.0).double().sigmoid(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gate.compute_gates(7 * x[:, :1])[0], gates[:, :1], rtol=1e-5, atol=0)


def test_a_gate_of_one_half_runs_at_a_threshold_of_one_half() -> None:
    model, (ids, places) = network(PLAIN, Depth(threshold=0.5)), text(4)
    set_gate(model, 0.0)
    reports: dict[str, list[Tensor]] = {GATES: [], EXECUTED: []}
    list(model.residuals(ids, places, reports=reports))
    assert reports[GATES][0].tolist() == [[0.5] * 4]
    assert reports[EXECUTED][0].tolist() == [[1.0] * 4]


DELTA = replace(PLAIN, mixer=gated_delta.GatedDelta(2, 4))


@pytest.mark.parametrize("layer", [PLAIN, WINDOWED, DELTA])
@torch.no_grad()
def test_decoding_rows_of_several_lengths_gives_each_row_alone_and_stores_what_ran(layer: Layer) -> None:
    model, length = network(layer, Depth(), layers=2), 14
    rows = [text(size)[0][0] for size in (14, 9, 3)]
    ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0)) for row in rows])
    mask, states, outputs = ids > 0, model.make_states(), []
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for start, end in ((0, 8), (8, 9), (9, 12), (12, 13), (13, 14)):
        arguments = ids[:, start:end], places[:, start:end], states
        outputs.append(model(*arguments, token_mask=mask[:, :end]))
    total = 0
    for n, row in enumerate(rows):
        reports: dict[str, list[Tensor]] = {EXECUTED: []}
        *_, residual = model.residuals(row[None], torch.arange(len(row))[None], reports=reports)
        expected, executed = model.norm(residual)[0], [int(report.sum()) for report in reports[EXECUTED]]
        torch.testing.assert_close(torch.cat(outputs, 1)[n, -len(row) :], expected, rtol=0, atol=1e-9)
        assert [states[i].texts[n].state.get_seq_length() for i in (0, 2)] == executed
        total += sum(executed)
    assert 0 < total < 2 * sum(map(len, rows))
    assert [state.get_seq_length() for state in states] == [length] * 4


@pytest.mark.parametrize("layer", [PLAIN, WINDOWED, DELTA])
@pytest.mark.parametrize("kept", range(4, 11))
@torch.no_grad()
def test_a_draft_is_taken_back_from_every_row(layer: Layer, kept: int) -> None:
    model, ids = network(layer, Depth(), layers=2), torch.randint(30, (2, 14))
    places, states = torch.arange(14).expand(2, 14), model.make_states()
    whole = model(ids, places)
    model(ids[:, :4], places[:, :4], states)
    record(states)
    draft = torch.cat([ids[:, 4:kept], (ids[:, kept:10] + 1) % 30], 1)
    for piece, piece_places in zip(draft.split((2, 1, 3), 1), places[:, 4:10].split((2, 1, 3), 1), strict=True):
        model(piece, piece_places, states)
    commit(states, kept)
    record(states, False)
    torch.testing.assert_close(model(ids[:, kept:], places[:, kept:], states), whole[:, kept:], rtol=0, atol=1e-9)


def test_a_state_counts_positions_copies_rows_and_refuses_what_it_does_not_hold() -> None:
    state = DepthState(KeyValues())
    state.record()
    for text_state in state.open_texts(torch.zeros(2, 3, dtype=torch.long)):
        text_state.state.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
        text_state.extend([0, 2], torch.tensor([0, 2]))
    state.advance(torch.zeros(2, 3, dtype=torch.long))
    state.batch_repeat_interleave(2)
    state.reorder_cache(torch.tensor([3, 0, 0]))
    state.texts[1].commit(1)
    assert [len(row.slots) for row in state.texts] == [2, 1, 2]
    assert [row.state.get_seq_length() for row in state.texts] == [2, 1, 2]
    state.crop(-1)
    assert state.get_mask_sizes(1) == (3, 0)
    assert [row.slots for row in state.texts] == [[0]] * 3
    with pytest.raises(UsageError, match="cannot keep the first 3 positions of a state that holds 2"):
        state.commit(3)
    with pytest.raises(UnsupportedModel, match="without a depth gate"):
        state.update(torch.ones(1), torch.ones(1))
    state.reset()
    assert (state.get_seq_length(), state.texts) == (0, [])


def test_foreign_states_and_trees_are_refused() -> None:
    model, (ids, places) = export_model(network(PLAIN, Depth())), text(4)
    with pytest.raises(UnsupportedModel, match="states of make_states"):
        model.backbone(ids, places, [KeyValues(), KeyValues()])
    places = torch.tensor([[0, 1, 1, 2]])  # a tree: two tokens follow the first
    distances = (places[:, :, None] - places[:, None]).clamp(min=-1)
    with pytest.raises(UnsupportedModel, match="one chain of tokens"):
        list(model.backbone.residuals(ids, places, distances=distances))


def test_reports_of_parts_behind_a_gate_are_0_where_no_token_runs() -> None:
    model, (ids, places) = network(replace(PLAIN, ffn=Experts(SwiGLU(6), 2)), Depth()), text(5, 6)
    reports: dict[str, list[Tensor]] = {ROUTER_LOGITS: [], EXECUTED: []}
    list(model.residuals(ids, places, reports=reports))
    gated, plain = ((report != 0).any(-1) for report in reports[ROUTER_LOGITS])
    assert torch.equal(gated, reports[EXECUTED][0] == 1)
    assert plain.all()


@pytest.mark.parametrize("bias", [None, 3.0])
def test_decoding_never_uses_code_that_ignores_the_gate(bias: float | None) -> None:
    backbone = network(PLAIN, Depth(unit_logit=3.0), layers=2)
    if bias is not None:
        for block in (backbone.layers[0], backbone.layers[2]):
            torch.nn.init.zeros_(block.depth.gate.weight)
            torch.nn.init.constant_(block.depth.gate.bias, bias)
    model = export_model(backbone.float())
    assert type(choose_reader(model, probe_model(model), 2, 30)) is SlotReader
    prompts = [text(length)[0][0] for length in (3, 5, 2)]
    sampling = Sampling(vocabulary=30, stop=frozenset(), temperature=0.0)
    rows = generate([(1.0, model)], prompts, torch.zeros(3, 2), [2, 2, 2], sampling)
    for prompt, row in zip(prompts, rows, strict=True):
        for use_cache in (True, False):
            written = model.generate(
                prompt[None], max_new_tokens=2, do_sample=False, use_cache=use_cache, eos_token_id=-1
            )
            assert written[0, len(prompt) :].tolist() == row


@pytest.mark.parametrize(("facts", "message"), [({"threshold": -0.1}, "threshold"), ({"load": 1.5}, "load")])
def test_facts_out_of_range_are_refused(facts: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Depth(**facts)


def test_a_layer_without_a_gate_is_written_as_before_and_old_files_open() -> None:
    data = PLAIN.to_dict()
    assert list(data) == ["mixer", "ffn", "post_norms"]
    assert Layer.from_dict(data) == PLAIN
    assert "depth gate" in replace(PLAIN, depth=Depth()).describe()


def test_costs_and_states_count_the_load() -> None:
    half = replace(PLAIN, depth=Depth(load=0.5))
    plain, seen = PLAIN.cost(12, 20.0), half.cost(12, 40.0)
    assert (seen.matrices, seen.seen) == (12 + plain.matrices / 2, plain.seen / 2)
    assert half.state_bytes(40, 2) == PLAIN.state_bytes(20, 2)


def test_a_layer_that_all_tokens_skip_stays_in_the_graph_and_changes_nothing() -> None:
    model, (ids, positions) = network(PLAIN, Depth(threshold=2.0)).train(), text(4, 3)
    output = model(ids, positions)
    output.sum().backward()
    gradients = [weight.grad for weight in model.layers[0].parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    model.layers[0] = torch.nn.Module()
    model.layers[0].forward = lambda x, *_: (x, None)
    assert torch.equal(model(ids, positions), output)
