"""The network: what each token may depend on, documents apart, states, checkpointing, initial weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from potstill.core.blueprint import Blueprint, Layer, Rotary, weight_shapes
from potstill.core.errors import UsageError
from potstill.core.serialization import freeze
from potstill.core.state import commit, record
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone, init_weights

PLAIN = Layer(Attention(4, 2, 8), SwiGLU(24))
MIXED = Blueprint(
    50,
    16,
    (
        PLAIN,
        Layer(Attention(2, 1, 6, qkv_bias=True, qk_norm=True, window=3), SwiGLU(10, bias=True)),
        Layer(Attention(3, 3, 4, out_bias=True), SwiGLU(7, activation="gelu")),
    ),
    rotary=Rotary(100.0, freeze({"rope_type": "linear", "factor": 2.0})),
    context=64,
)
SLIDING = Attention(4, 2, 8, qk_norm=True, window=3, scale=0.2, rotary=Rotary(50.0))
GEMMA = Blueprint(
    50,
    16,
    (Layer(SLIDING, SwiGLU(24), post_norms=True), Layer(PLAIN.mixer, SwiGLU(24), post_norms=True), PLAIN),
    tied=True,
    context=64,
    embedding_scale=4.5,
    zero_centred_norms=True,
    logit_softcap=5.0,
)
KINDS = {
    "mixed": MIXED,
    "tied": replace(MIXED, tied=True),
    "uniform": replace(MIXED, layers=(PLAIN,) * 2),
    "gemma": GEMMA,
}
EACH = pytest.mark.parametrize("kind", KINDS)


def network(kind: str = "mixed") -> Backbone:
    model = Backbone(KINDS[kind]).double().eval()
    init_weights(model, std=0.3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


def text(*lengths: int) -> tuple[Tensor, Tensor]:
    return torch.randint(50, (1, sum(lengths))), torch.cat([torch.arange(n) for n in lengths])[None]


@EACH
def test_a_packed_batch_equals_its_documents_alone_with_their_gradients(kind: str) -> None:
    lengths = (5, 1, 8, 3)
    model, (ids, positions) = network(kind), text(*lengths)
    weights = list(model.parameters())
    pull = torch.randn(1, sum(lengths), 16).double()
    packed = model(ids, positions)
    gradients = torch.autograd.grad((packed * pull).sum(), weights, allow_unused=True)
    pairs = zip(ids.split(lengths, 1), positions.split(lengths, 1), strict=True)
    alone = torch.cat([model(*pair) for pair in pairs], 1)
    again = torch.autograd.grad((alone * pull).sum(), weights, allow_unused=True)
    # norms round to float32 inside, as the stock models do
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-6)
    for one, other in zip(gradients, again, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@EACH
def test_a_token_depends_on_its_document_s_past_and_nothing_else(kind: str) -> None:
    model, (ids, positions) = network(kind), text(3, 4)
    embedded = model.embed(ids).detach().requires_grad_()
    model(None, positions, inputs_embeds=embedded)[0, 5].sum().backward()
    assert embedded.grad is not None
    assert (embedded.grad[0].abs().sum(-1) > 0).tolist() == [False] * 3 + [True] * 3 + [False]


@EACH
@pytest.mark.parametrize("pieces", [[9], [1] * 9, [5, 1, 3]])
def test_decoding_with_states_gives_what_the_whole_text_gives(kind: str, pieces: list[int]) -> None:
    model, (ids, positions) = network(kind), text(9)
    states, outputs = model.make_states(), []
    for part, places in zip(ids.split(pieces, 1), positions.split(pieces, 1), strict=True):
        outputs.append(model(part, places, states))
    torch.testing.assert_close(torch.cat(outputs, 1), model(ids, positions), rtol=0, atol=1e-6)


def test_a_draft_taken_back_leaves_no_trace() -> None:
    model, (ids, positions) = network(), text(9)
    states = model.make_states()
    model(ids[:, :5], positions[:, :5], states)
    record(states)
    model(torch.full((1, 4), 7), positions[:, 5:], states)
    commit(states, 5)
    after = model(ids[:, 5:], positions[:, 5:], states)
    torch.testing.assert_close(after, model(ids, positions)[:, 5:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(side: str) -> None:
    model, (ids, positions) = network(), text(6)
    pad = torch.zeros(1, 3, dtype=torch.long)
    parts = (pad, ids) if side == "left" else (ids, pad)
    places = (pad, positions) if side == "left" else (positions, pad)
    real = torch.cat([torch.zeros_like(pad) if x is pad else torch.ones_like(ids) for x in parts], 1).bool()
    padded = model(torch.cat(parts, 1), torch.cat(places, 1), token_mask=real)
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[real][None], model(ids, positions), rtol=0, atol=1e-6)


def test_rows_cut_differently_share_a_batch() -> None:
    model = network()
    one, other = text(4, 4), text(1, 7)
    both = model(torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]]))
    torch.testing.assert_close(both, torch.cat([model(*one), model(*other)]), rtol=0, atol=1e-6)


def test_residuals_are_the_embedding_and_what_each_layer_leaves() -> None:
    model, (ids, positions) = network(), text(5)
    stream = [*model.residuals(ids, positions)]
    assert len(stream) == 4
    assert torch.equal(stream[0], model.embed(ids))
    assert torch.equal(model.norm(stream[-1]), model(ids, positions))


def test_checkpointing_changes_no_gradient_and_runs_each_layer_twice() -> None:
    model, (ids, positions) = network().train(), text(4, 5)
    plain = torch.autograd.grad(model(ids, positions).pow(2).sum(), list(model.layers.parameters()))
    runs = []
    model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing = True
    saved = torch.autograd.grad(model(ids, positions).pow(2).sum(), list(model.layers.parameters()))
    assert len(runs) == 2
    for one, other in zip(plain, saved, strict=True):
        torch.testing.assert_close(one, other)


@EACH
def test_a_network_built_on_the_meta_device_lacks_nothing_once_its_weights_are_loaded(kind: str) -> None:
    model, (ids, positions) = network(kind), text(6)
    with torch.device("meta"):
        again = Backbone(KINDS[kind])
    again.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert torch.equal(again(ids, positions), model(ids, positions))
    assert not list(again.buffers())


@EACH
def test_the_head_gives_logits_and_is_the_embedding_where_tied(kind: str) -> None:
    model, rows = network(kind), torch.randn(3, 16).double()
    head = model.head()
    tied, cap = model.blueprint.tied, model.blueprint.logit_softcap
    assert (head.weight is model.embed.weight) == tied
    logits = rows @ head.weight.T
    assert torch.equal(head.logits(rows), logits if cap is None else cap * torch.tanh(logits / cap))
    assert ("head.weight" in model.state_dict()) != tied


def test_fresh_zero_centred_norms_multiply_by_one() -> None:
    model = Backbone(GEMMA)
    init_weights(model)
    x = torch.randn(2, 16)
    for norm in (model.norm, model.layers[0].mixer_post_norm):
        torch.testing.assert_close(norm(x), x * (x.pow(2).mean(-1, keepdim=True) + GEMMA.norm_eps).rsqrt())


def test_fresh_weights_have_the_spread_asked_for_and_follow_the_generator() -> None:
    model = Backbone(replace(MIXED, vocabulary=500))
    init_weights(model, std=0.1, rng=torch.Generator().manual_seed(4))
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert float(state["embed.weight"].std()) == pytest.approx(0.1, rel=0.05)
    assert bool((state["layers.1.mixer.q.bias"] == 0).all())
    assert bool((state["layers.1.mixer.q_norm.weight"] == 1).all())
    assert bool((state["norm.weight"] == 1).all())
    init_weights(model, std=0.1, rng=torch.Generator().manual_seed(4))
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert state.keys() == weight_shapes(model.blueprint).keys()


def test_states_for_another_depth_are_refused() -> None:
    model, (ids, positions) = network(), text(4)
    with pytest.raises(UsageError, match="2 states for 3 layers"):
        model(ids, positions, model.make_states()[:2])


@pytest.mark.parametrize("past", [0, 2])
def test_two_documents_in_one_state_are_refused(past: int) -> None:
    model, states = network(), network().make_states()
    if past:
        model(*text(past), states)
    with pytest.raises(UsageError, match="cannot share one state"):
        model(*text(2, 2), states)
