"""Small networks and batches that every transform is tried on, and their definitions without hooks or shortcuts."""

import hashlib
import textwrap
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from potstill.core.blueprint import Blueprint, Layer, Rotary
from potstill.core.types import Batch, supervised_positions
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone, init_weights

LLAMA = Attention(heads=6, kv_heads=3, head_dim=4)
QWEN2 = Attention(heads=6, kv_heads=3, head_dim=4, qkv_bias=True)
QWEN3 = Attention(heads=3, kv_heads=3, head_dim=8, qk_norm=True)
BIASED = Attention(heads=6, kv_heads=3, head_dim=4, qkv_bias=True, out_bias=True)

SLIDING = Attention(heads=6, kv_heads=3, head_dim=4, qk_norm=True, window=4, rotary=Rotary(50.0))
FULL = replace(SLIDING, window=None, rotary=None)

KINDS = {
    "llama tied": Blueprint(23, 16, (Layer(LLAMA, SwiGLU(10)),), tied=True, context=64),
    "qwen2 untied": Blueprint(23, 16, (Layer(QWEN2, SwiGLU(10)),), context=64),
    "qwen3 tied": Blueprint(23, 16, (Layer(QWEN3, SwiGLU(10)),), tied=True, context=64),
    "llama with every bias": Blueprint(23, 16, (Layer(BIASED, SwiGLU(10, bias=True)),), context=64),
    "gemma3": Blueprint(
        23,
        16,
        tuple(Layer(mixer, SwiGLU(10), post_norms=True) for mixer in (SLIDING, FULL)),
        tied=True,
        context=64,
        embedding_scale=4.0,
        zero_centred_norms=True,
        logit_softcap=8.0,
    ),
}


def build(kind: str, *, layers: int = 3, hidden: int = 16) -> Backbone:
    """A network with weights far enough from zero that each unit matters, biases and gains included.

    The kind's layers are repeated in turn.
    """
    drawn = KINDS[kind]
    scale = 1.0 if drawn.embedding_scale == 1 else hidden**0.5
    stack = tuple(islice(cycle(drawn.layers), layers))
    model = Backbone(replace(drawn, hidden=hidden, layers=stack, embedding_scale=scale))
    init_weights(model, std=0.3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.2 * torch.randn_like(weight)
    return model.eval()


def packed(*lengths: int, vocabulary: int = 23) -> Batch:
    """Random documents of these lengths, end to end in one row."""
    ids = torch.randint(vocabulary, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "documents": documents}


def ones(model: Backbone) -> dict[str, Tensor]:
    """Masks that hide nothing: `xi` [L G] on heads, `nu` [L F] on neurons, `eta` [D] on coordinates."""
    layer, layers = model.blueprint.layers[0], len(model.blueprint.layers)
    return {
        "xi": torch.ones(layers, layer.cuts()["kv_heads"].size),
        "nu": torch.ones(layers, layer.cuts()["ffn"].size),
        "eta": torch.ones(model.blueprint.hidden),
    }


def masked_loss(model: Backbone, batch: Batch, masks: dict[str, Tensor], *, mean_over: Tensor | None = None) -> Tensor:
    """The loss with masks, by definition (MiniMA's placement); norms take their mean over `mean_over` coordinates."""
    xi, nu, eta = masks["xi"], masks["nu"], masks["eta"]
    measured = torch.arange(len(eta)) if mean_over is None else mean_over

    def norm(module: torch.nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, torch.nn.Identity):
            return x
        gain = module.weight + (1 if model.blueprint.zero_centred_norms else 0)
        return gain * x * (x[..., measured].pow(2).mean(-1, keepdim=True) + module.eps).rsqrt()

    x = model.embed(batch["input_ids"]) * eta
    positions = model._make_positions(batch["position_ids"], None, None)
    for i, block in enumerate(model.layers):
        width = block.mixer.o.in_features // xi.shape[1]
        hook = block.mixer.o.register_forward_pre_hook(
            lambda _, inputs, i=i, width=width: (inputs[0] * xi[i].repeat_interleave(width),)
        )
        mixed, _ = block.mixer(norm(block.mixer_norm, x), positions, None)
        hook.remove()
        x = (x + eta * norm(block.mixer_post_norm, mixed)) * eta
        hook = block.ffn.down.register_forward_pre_hook(lambda _, inputs, i=i: (inputs[0] * nu[i],))
        x = (x + eta * norm(block.ffn_post_norm, block.ffn(norm(block.ffn_norm, x), positions))) * eta
        hook.remove()
    asked, targets, _ = supervised_positions(batch)
    return cross_entropy(model.head().logits(norm(model.norm, x)[asked]), targets)


def digest(model: torch.nn.Module) -> str:
    """A hash of every weight."""
    total = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        total.update(name.encode() + weight.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def learnt() -> tuple[Backbone, list[Batch], list[Batch]]:
    """(a character model that learnt a piece of English prose and code, batches to measure on, batches to judge by)."""
    text = Path(textwrap.__file__).read_bytes()
    data = torch.tensor(list(text)).clamp(max=127)
    cut = len(data) * 4 // 5
    mixer = Attention(heads=8, kv_heads=8, head_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Backbone(Blueprint(128, 48, (Layer(mixer, SwiGLU(96)),) * 2, tied=True, context=64))
        init_weights(model, std=0.08)
        optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(250):
            rows = _rows(data[:cut], torch.randint(cut - 48, (12,)))
            asked, targets, _ = supervised_positions(rows)
            optimiser.zero_grad()
            hidden = model(rows["input_ids"], rows["position_ids"])
            cross_entropy(model.head().logits(hidden[asked]), targets).backward()
            optimiser.step()
        starts = torch.randint(cut - 48, (6, 12))
        seen = [_rows(data[:cut], s) for s in starts]
        unseen = [_rows(data[cut:], torch.arange(0, len(data) - cut - 48, 53))]
    return model.eval(), seen, unseen


def _rows(data: Tensor, starts: Tensor) -> Batch:
    ids = torch.stack([data[s : s + 48] for s in starts])
    labels = ids.clone()
    labels[:, 0] = -100
    positions = torch.arange(48).expand_as(ids)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "documents": torch.zeros_like(ids)}
