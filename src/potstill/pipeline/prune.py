"""Prune: a model and a budget in, a smaller model of the same family out, its logits compared after a reload."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from potstill.core import backend
from potstill.core.artefact import Card, require_free, writing
from potstill.core.errors import ArtefactError, InfeasibleTarget
from potstill.core.types import Batch
from potstill.evaluate.reading import context_of
from potstill.models.backbone import Backbone
from potstill.models.families.table import export_model, import_model
from potstill.models.load import Loaded, load
from potstill.pipeline.card import write_card
from potstill.pipeline.stage import (
    as_value,
    command,
    disk,
    parent,
    require_apart,
    require_choice,
    require_one_process,
    require_size,
    require_strategy,
)
from potstill.pipeline.texts import Text, calibration
from potstill.transforms.apply import apply
from potstill.transforms.drop_layers import DropLayers, by_harm, evenly
from potstill.transforms.fit import AUTO, DIMENSIONS, Shape, dimensions, fit, parameters, shape_of
from potstill.transforms.importance import measure, next_token_loss
from potstill.transforms.narrow import select


@dataclass(frozen=True, kw_only=True)
class Prune:
    """A smaller model by removing layers (by measured harm, or evenly), key/value groups, neurons and hidden
    coordinates (by first-order importance on `data`), all layers alike, so that it stays of its family.

    The size comes from one of `keep` (share of all stored parameters), `params`, or `shape` alone.
    Source: MiniMA (arXiv:2311.07052), section 3. Ours: layers by harm, and what `strategy="auto"` cuts (see
    `fit.dimensions`).
    """

    kind: ClassVar[str] = "prune"
    model: str
    data: str = "stdlib"
    columns: str = ""
    keep: float | None = None
    params: int | None = None
    strategy: str = AUTO
    shape: Mapping[str, int] = field(default_factory=dict)
    layers_by: str = "harm"
    calibration_tokens: int = 8192
    seed: int = 1
    device: str = "auto"
    dtype: str = "auto"
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require_size({"keep": self.keep, "params": self.params}, also=bool(self.shape))
        require_strategy(self.strategy)
        require_choice("layers-by", self.layers_by, ("harm", "evenly"))

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False) -> Card:
        """Prunes, saves, reloads and compares; the folder appears only if all of that went well.

        Raises: UsageError, InfeasibleTarget, NotFound, OutputExists before anything is written.
        """
        require_one_process()
        require_apart(out, self.model, self.data)
        require_free(out, overwrite=overwrite)
        loaded = load(self.model, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)
        student, card = self.apply(loaded)
        with disk(out), writing(out, overwrite=overwrite) as folder:
            save(student, loaded, folder)
            gap = reload_gap(student, folder, trust_remote_code=self.trust_remote_code)
            card = replace(card, invariants=[{"name": "logits after reload", "outcome": f"equal within {gap:.1e}"}])
            write_card(folder, card, title=out.name)
        return card

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return as_value(self)

    def apply(self, loaded: Loaded) -> tuple[PreTrainedModel, Card]:
        """The pruned model in memory, as its stock family, with the card that says what went."""
        backbone = import_model(loaded.model)
        target = self.target(backbone)
        text = Text(data=self.data, columns=self.columns, context=min(512, context_of(loaded.model)), seed=self.seed)
        batches, facts = calibration(text, loaded.tokenizer, tokens=self.calibration_tokens)
        device = backend.device(self.device)
        with autocast(device, backend.dtype(self.dtype, on=str(device))):
            batches = [{name: values.to(device) for name, values in batch.items()} for batch in batches]
            pruned, found = shrink(backbone.to(device), target, batches, layers_by=self.layers_by)
        details = {
            "shape": target.to_dict(),
            "parameters": parameters(pruned.blueprint),
            "share": parameters(pruned.blueprint) / parameters(backbone.blueprint),
            **found,
        }
        card = Card(
            stage=as_value(self),
            seed=self.seed,
            parents=[parent("pruned from", loaded)],
            data=facts,
            details=details,
            command=command(),
        )
        return export_model(pruned.cpu(), loaded.model), card

    def target(self, backbone: Backbone) -> Shape:
        """The shape that is asked for.

        Raises: InfeasibleTarget, UsageError.
        """
        whole = backbone.blueprint
        if self.params is not None and self.params > parameters(whole):
            raise InfeasibleTarget(
                f"{self.params:,} parameters are more than the model's {parameters(whole):,}; ask for fewer"
            )
        share = 1.0 if self.params is None else self.params / parameters(whole)
        free = self.strategy == AUTO and self.shape  # with some sizes stated, all others may have to follow
        dims = DIMENSIONS if free else dimensions(self.strategy, share if self.keep is None else self.keep)
        return fit(whole, keep=self.keep, params=self.params, dims=dims, exact=dict(self.shape))


def shrink(
    model: Backbone, target: Shape, batches: Sequence[Batch], *, layers_by: str
) -> tuple[Backbone, dict[str, Any]]:
    """`model` at shape `target`, and what decided: width, then depth, as in MiniMA, measured on the whole."""
    old, found = shape_of(model.blueprint), {}
    kept = tuple(range(old.layers))
    if target.layers < old.layers and layers_by == "harm":
        harm = by_harm(model, batches[:1], next_token_loss, target.layers, greedy=False)
        kept, found["harm"] = harm.keep, harm.to_dict()
    elif target.layers < old.layers:
        kept = evenly(old.layers, target.layers)
    narrow: dict[str, Any] = {
        name: size
        for name, size in {"kv_heads": target.kv_heads, "ffn": target.ffn, "hidden": target.hidden}.items()
        if size < getattr(old, name)
    }
    if narrow:
        statistics = measure(model, batches, next_token_loss)
        model = apply(select(statistics, **narrow), model)
    if len(kept) < old.layers:
        model = apply(DropLayers(kept), model)
    return model, {"kept_layers": list(kept), **found}


def save(model: PreTrainedModel, origin: Loaded, folder: Path) -> None:
    """A stock folder: weights, config, generation config, tokenizer."""
    model.generation_config = origin.model.generation_config
    model.save_pretrained(folder)
    origin.tokenizer.save_pretrained(folder)


@torch.no_grad()
def reload_gap(model: PreTrainedModel, folder: Path, *, trust_remote_code: bool = False) -> float:
    """The largest difference between the logits of `model` and those of the model reloaded from `folder`.

    Raises: ArtefactError if it is more than rounding.
    """
    again = load(folder, device=model.device, trust_remote_code=trust_remote_code).model.to(model.dtype)
    ids = torch.arange(3, 35, device=model.device)[None] % model.config.vocab_size
    ours, theirs = (m.eval()(input_ids=ids, use_cache=False).logits for m in (model, again))
    gap = float((ours - theirs).abs().max())
    if not gap <= 1e-4 * float(ours.abs().max()):
        raise ArtefactError(f"the reloaded model's logits differ by {gap:.3g}; nothing was kept, please report this")
    return gap


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Matrices multiplied in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
