"""The laws that every kind of part keeps: shipped ones, and those of `tests/layers/extensions`.

A new kind is found by its registration, and its `examples` are tried; nothing here names a kind.
"""

import copy
import json
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from pkgutil import iter_modules

import pytest
import tests.layers.extensions
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from potstill.core.blueprint import Blueprint, Layer, weight_shapes
from potstill.core.depth import EXECUTED, Depth
from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.parts import KINDS, FeedForward, Linear, Mixer, Part
from potstill.core.state import commit, record
from potstill.core.types import Batch, supervised_positions
from potstill.decode.generate import generate
from potstill.decode.sampling import Sampling
from potstill.evaluate.size import count_blueprint_parameters, count_weight_bytes
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone, init_weights
from potstill.models.families.registry import FAMILIES, export_model, find_family, import_model
from potstill.transforms.apply import apply_transform
from potstill.transforms.importance import measure_importance, next_token_loss
from potstill.transforms.narrow import Narrow, select_units

for module in iter_modules(tests.layers.extensions.__path__):
    import_module(f"tests.layers.extensions.{module.name}")

HIDDEN, VOCABULARY = 12, 30
PLAIN = Layer(Attention(6, 3, 4), SwiGLU(10))
EXAMPLES = {f"{name} {i}": part for name, facts in KINDS.items() for i, part in enumerate(facts.examples())}
EVERY_KIND = pytest.mark.parametrize("part", EXAMPLES.values(), ids=EXAMPLES)


def layer_of(part: Part) -> Layer:
    if isinstance(part, Mixer | Depth):
        return replace(PLAIN, **{"mixer" if isinstance(part, Mixer) else "depth": part})
    return replace(PLAIN, ffn=part) if isinstance(part, FeedForward) else replace(PLAIN, linear=part)


def blueprint_of(part: Part) -> Blueprint:
    """A hybrid stack: a layer with the part, and a plain one."""
    return Blueprint(VOCABULARY, HIDDEN, (layer_of(part), PLAIN), context=64)


def network(part: Part) -> Backbone:
    model = Backbone(blueprint_of(part)).double().eval()
    init_weights(model, std=0.4)
    return model


def text(*lengths: int) -> tuple[Tensor, Tensor]:
    return torch.randint(VOCABULARY, (1, sum(lengths))), torch.cat([torch.arange(n) for n in lengths])[None]


def batch_of(*lengths: int) -> Batch:
    ids, positions = text(*lengths)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "documents": documents}


def test_every_registered_kind_has_examples() -> None:
    assert all(facts.examples() for facts in KINDS.values())
    assert {"attention", "swiglu", "dense", "depth", "experts", "test_gated_delta"} <= KINDS.keys()


@EVERY_KIND
def test_it_survives_json(part: Part) -> None:
    blueprint = blueprint_of(part)
    again = Blueprint.from_dict(json.loads(json.dumps(blueprint.to_dict())))
    assert again == blueprint
    assert hash(again) == hash(blueprint)


@EVERY_KIND
def test_its_shapes_are_those_of_the_network(part: Part) -> None:
    blueprint = blueprint_of(part)
    with torch.device("meta"):
        state, unpacked = (Backbone(form).state_dict() for form in (blueprint, blueprint.trainable_form))
    assert list(weight_shapes(blueprint).items()) == [(name, tuple(weight.shape)) for name, weight in state.items()]
    assert count_blueprint_parameters(blueprint).total == sum(weight.numel() for weight in unpacked.values())
    assert count_weight_bytes(blueprint, itemsize=4) == sum(weight.nbytes for weight in state.values())


@EVERY_KIND
@torch.no_grad()
def test_its_cost_is_what_torch_counts(part: Part) -> None:
    model, (ids, positions) = network(part), text(3)  # short enough for any window
    places, x = model._make_positions(positions, None, None), model.embed(ids)
    places.lengths, places.token_mask = None, torch.ones(1, 3, dtype=torch.bool)  # scores of all pairs, as torch counts
    places.reports = {EXECUTED: []}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the one attention that it counts
        model.layers[0](x, places)
    layer = layer_of(part)
    if layer.depth is not None:
        layer = replace(layer, depth=replace(layer.depth, load=places.reports[EXECUTED][0].mean().item()))
    cost = layer.cost(HIDDEN, 3.0)
    assert counter.get_total_flops() == 3 * 2 * (cost.matrices + cost.seen)


@EVERY_KIND
@torch.no_grad()
def test_a_cut_anywhere_is_the_old_network_with_those_units_silent(part: Part) -> None:
    model, batch = network(part), batch_of(5, 4)
    if not model.blueprint.layers[0].linear.has_exact_cuts:
        pytest.skip("its weights share a scale")
    for name, cut in model.blueprint.layers[0].cuts().items():
        for unit in range(cut.size if cut.size > 1 else 0):
            kept = tuple(i for i in range(cut.size) if i != unit)
            narrow = apply_transform(Narrow(units={name: (kept, None)}), model)  # strict load inside
            mask = torch.ones(cut.size).double()
            mask[unit] = 0

            def silence(_, inputs, mask=mask, size=cut.size):
                return ((inputs[0].unflatten(-1, (size, -1)) * mask[:, None]).flatten(-2), *inputs[1:])

            hooks = [model.layers[0].get_submodule(m).register_forward_pre_hook(silence) for m in cut.measured_at]
            expected = next_token_loss(model, batch)
            for hook in hooks:
                hook.remove()
            torch.testing.assert_close(next_token_loss(narrow, batch), expected, rtol=0, atol=1e-6)


@EVERY_KIND
def test_width_is_cut_and_importance_measured_in_a_hybrid_stack(part: Part) -> None:
    model, batches = network(part), [batch_of(6, 7)]
    scores = measure_importance(model, batches, next_token_loss)
    sizes = dict.fromkeys(scores.units, 1)
    if model.blueprint != model.blueprint.trainable_form:
        with pytest.raises(UsageError, match="prune the model that they were packed from"):
            apply_transform(select_units(scores, hidden=6), model)
        return
    pruned = apply_transform(select_units(scores, hidden=6, **sizes), model)
    assert pruned.blueprint.hidden == 6
    assert all(cut.size == 1 for layer in pruned.blueprint.layers for cut in layer.cuts().values())
    assert next_token_loss(pruned, batches[0]).isfinite()


@EVERY_KIND
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(part: Part) -> None:
    model, (ids, positions) = network(part), text(5, 1, 7)
    packed = model(ids, positions)
    other = ids.clone()
    other[:, :6] = (ids[:, :6] + 1) % VOCABULARY
    assert torch.equal(model(other, positions)[:, 6:], packed[:, 6:])
    pairs = zip(ids.split((5, 1, 7), 1), positions.split((5, 1, 7), 1), strict=True)
    torch.testing.assert_close(packed, torch.cat([model(*pair) for pair in pairs], 1), rtol=0, atol=1e-6)


@EVERY_KIND
def test_a_token_depends_on_its_past_and_not_on_its_future(part: Part) -> None:
    model, (ids, positions) = network(part), text(6)
    vectors = model.embed(ids).detach().requires_grad_()
    model(None, positions, inputs_embeds=vectors)[0, 3].sum().backward()
    assert vectors.grad is not None
    assert (vectors.grad[0].abs().sum(-1) > 0).tolist() == [True] * 4 + [False] * 2


@EVERY_KIND
@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 3, 1]])
@torch.no_grad()
def test_decoding_in_pieces_gives_what_the_whole_gives(part: Part, pieces: list[int]) -> None:
    model, (ids, positions) = network(part), text(9)
    states = model.make_states()
    outputs = [model(i, p, states) for i, p in zip(ids.split(pieces, 1), positions.split(pieces, 1), strict=True)]
    assert [state.get_seq_length() for state in states] == [9, 9]
    torch.testing.assert_close(torch.cat(outputs, 1), model(ids, positions), rtol=0, atol=1e-6)


@EVERY_KIND
@torch.no_grad()
def test_a_copy_of_a_state_goes_on_where_it_was_made(part: Part) -> None:
    model, (ids, positions) = network(part), text(9)
    states = model.make_states()
    model(ids[:, :5], positions[:, :5], states)
    copies = copy.deepcopy(states)
    assert not [value for state in copies for value in vars(state).values() if hasattr(value, "__self__")]
    model((ids[:, 5:] + 1) % VOCABULARY, positions[:, 5:], states)
    rest, whole = model(ids[:, 5:], positions[:, 5:], copies), model(ids, positions)
    torch.testing.assert_close(rest, whole[:, 5:], rtol=0, atol=1e-6)


@EVERY_KIND
@torch.no_grad()
def test_its_state_takes_the_bytes_that_its_facts_say(part: Part) -> None:
    model, (ids, positions) = network(part).bfloat16(), text(9)
    for pieces in ([9], [1] * 9):
        states, length = model.make_states(), 0
        for i, p in zip(ids.split(pieces, 1), positions.split(pieces, 1), strict=True):
            model(i, p, states)
            length += i.shape[1]
            for state, layer in zip(states, model.blueprint.layers, strict=True):
                taken, stated = sum(x.nbytes for x in list_numbers(state).values()), layer.state_bytes(length, 2)
                assert taken == stated if layer.depth is None else taken <= stated  # of tokens that run


def list_numbers(value: object) -> dict[int, Tensor]:
    """The different tensors of numbers anywhere in a state."""
    if isinstance(value, Tensor):
        return {id(value): value} if value.is_floating_point() else {}
    items = list(value) if isinstance(value, tuple | list) else [*getattr(value, "__dict__", {}).values()]
    return {key: tensor for item in items for key, tensor in list_numbers(item).items()}


@EVERY_KIND
@pytest.mark.parametrize("kept", range(4, 9))
@torch.no_grad()
def test_a_draft_is_taken_back_to_any_point_since_the_last_commit(part: Part, kept: int) -> None:
    model, (ids, positions) = network(part), text(12)
    whole, states = model(ids, positions), model.make_states()
    model(ids[:, :4], positions[:, :4], states)
    record(states)
    drafts = [ids[:, 4:kept], (ids[:, kept:8] + 1) % VOCABULARY]  # what holds, and what does not
    for a, b, piece in zip((4, kept), (kept, 8), drafts, strict=True):
        if b > a:
            model(piece, positions[:, a:b], states)
    commit(states, kept)
    commit(states, kept)
    model(torch.full((1, 2), 3), positions[:, kept : kept + 2], states)  # another draft, all of it wrong
    commit(states, kept)
    record(states, False)
    torch.testing.assert_close(model(ids[:, kept:], positions[:, kept:], states), whole[:, kept:], rtol=0, atol=1e-6)


@EVERY_KIND
@torch.no_grad()
def test_a_saved_model_opens_again_and_generates_alike_with_and_without_a_cache(part: Part, tmp_path: Path) -> None:
    model = export_model(network(part).float())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = text(5)[0].clamp(min=1)  # 0 is padding
    # products with one row or column round by the alignment of their memory
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert import_model(again).blueprint.layers == blueprint_of(part).layers
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = again.generate(ids, **options)
    assert written.tolist() == again.generate(ids, use_cache=False, **options).tolist()
    assert again.generate(ids, num_beams=3, **options).shape == (1, 11)
    sampling = Sampling(vocabulary=VOCABULARY, stop=frozenset(), temperature=0.0)
    prompts = [ids[0], text(2)[0][0]]  # padded on the left
    assert generate([(1.0, again)], prompts, torch.zeros(2, 6), [6, 2], sampling)[0] == written[0, 5:].tolist()


@EVERY_KIND
@pytest.mark.parametrize("pieces", [[8], [3, 4, 1]])
@torch.no_grad()
def test_a_batch_padded_on_the_left_is_its_rows_alone(part: Part, pieces: list[int]) -> None:
    model, (ids, mask, rows) = network(part), pad_left((8, 2, 5))  # the first 3 tokens of a row are all padding
    alone = [model(row[None], torch.arange(len(row))[None])[0] for row in rows]
    for positions in (torch.arange(8).expand(3, 8), (mask.cumsum(1) - 1).clamp(min=0)):
        states, outputs, end = model.make_states(), [], 0
        for piece, piece_positions in zip(ids.split(pieces, 1), positions.split(pieces, 1), strict=True):
            end += piece.shape[1]
            outputs.append(model(piece, piece_positions, states, token_mask=mask[:, :end]))
        for hidden, expected in zip(torch.cat(outputs, 1), alone, strict=True):
            torch.testing.assert_close(hidden[-len(expected) :], expected, rtol=0, atol=1e-6)


@EVERY_KIND
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_writes_for_a_padded_batch_what_it_writes_for_its_rows(part: Part, beams: int) -> None:
    model = export_model(network(part).float())
    ids, mask, rows = pad_left((8, 2, 5))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    alone = [model.generate(row[None], **options)[0, len(row) :] for row in rows]
    for use_cache in (True, False):
        written = model.generate(ids, attention_mask=mask.long(), use_cache=use_cache, **options)[:, 8:]
        assert written.tolist() == torch.stack(alone).tolist()


@EVERY_KIND
@torch.no_grad()
def test_generate_with_an_assistant_writes_what_it_writes_alone(part: Part) -> None:
    net = network(part).float()
    model, ids = export_model(net), text(5)[0].clamp(min=1)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(ids, **options)
    for weight in net.parameters():
        weight += 0.1 * weight.abs().mean() * torch.randn_like(weight)  # its drafts hold now and then
    assert torch.equal(model.generate(ids, assistant_model=export_model(net), **options), alone)


def pad_left(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(ids, mask of the tokens, the rows alone)."""
    rows = [text(length)[0][0].clamp(min=1) for length in lengths]
    ids = torch.stack([pad(row, (max(lengths) - len(row), 0)) for row in rows])
    return ids, ids != 0, rows


@EVERY_KIND
def test_a_checkpointed_layer_has_the_same_gradients(part: Part) -> None:
    model, batch = network(part).train(), batch_of(4, 5)
    plain = torch.autograd.grad(next_token_loss(model, batch), list(model.parameters()))
    model.gradient_checkpointing = True
    again = torch.autograd.grad(next_token_loss(model, batch), list(model.parameters()))
    for one, other in pairwise((plain, again)):
        torch.testing.assert_close(one, other)


@EVERY_KIND
def test_a_family_claims_only_the_kinds_that_it_is_made_of(part: Part) -> None:
    blueprint = replace(blueprint_of(part), layers=(layer_of(part),) * 2)
    family = find_family(blueprint)
    assert family is None or blueprint.kinds() <= family.kinds
    if not {type(part)} & {kind for f in FAMILIES.values() for kind in f.kinds}:
        assert family is None


@EVERY_KIND
def test_reports_arrive_under_the_names_that_its_facts_give(part: Part) -> None:
    model, batch = network(part), batch_of(4, 5)
    names = model.blueprint.reports()
    reports: dict[str, list[Tensor]] = {name: [] for name in names}
    *_, _ = model.residuals(batch["input_ids"], batch["position_ids"], reports=reports)
    assert all(values and all(value.shape[:2] == (1, 9) for value in values) for values in reports.values())
    assert supervised_positions(batch)[0].shape == (1, 9)


def test_a_linear_kind_is_a_part_of_the_layer() -> None:
    assert Layer(Attention(2, 1, 4), SwiGLU(4)).linear == Linear()
    assert "linear" not in Layer(Attention(2, 1, 4), SwiGLU(4)).to_dict()


@EVERY_KIND
@pytest.mark.parametrize("is_padded", [False, True])
@torch.no_grad()
def test_a_continuation_sees_its_prompt_or_is_refused(part: Part, is_padded: bool) -> None:
    model, (prompt, first, second) = network(part), (torch.randint(VOCABULARY, (1, n)) for n in (4, 3, 5))
    padding = torch.zeros(1, 2 if is_padded else 0, dtype=torch.long)
    ids = torch.cat([prompt, first, second, padding], 1)
    positions = torch.cat([torch.arange(7), torch.arange(4, 9), padding[0]])[None]
    mask = torch.arange(ids.shape[1])[None] < 12
    whole = torch.cat([prompt, second], 1)
    if is_padded or (isinstance(part, Mixer) and not isinstance(part, Attention)):
        with pytest.raises(UnsupportedModel, match="cannot share a prompt; repeat it before each of its continuations"):
            model(ids, positions, token_mask=mask)
        return
    rows = model(ids, positions, token_mask=mask)[:, 7:12]
    torch.testing.assert_close(rows, model(whole, torch.arange(9)[None])[:, 4:], rtol=1e-9, atol=1e-9)
