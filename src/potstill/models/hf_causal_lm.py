"""potstill's architecture as a Hugging Face causal language model, for networks that no stock family expresses.

Importing this module registers it with transformers' Auto classes:

    from potstill import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("folder")

Packed documents (positions that restart) never see one another in this model; it needs no patch of attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.state import State, record
from potstill.layers.heads import LanguageHead
from potstill.layers.norm import RMSNorm
from potstill.layers.registry import DrawsWeights
from potstill.models.backbone import Backbone
from potstill.models.hf_config import PotstillConfig
from potstill.ops.layout import stack_ragged

__all__ = ["AutoModelForCausalLM", "PotstillConfig", "PotstillForCausalLM", "PotstillModel"]


class _PotstillPreTrainedModel(PreTrainedModel):
    config_class = PotstillConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("Block",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LanguageHead):
            nn.init.normal_(module.weight, 0.0, self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            module.reset_parameters()
        elif isinstance(module, DrawsWeights):
            module.draw_weight(self.config.initializer_range, None)


@dataclass
class PotstillModelOutput(BaseModelOutputWithPast):
    """The output of `PotstillModel`: stock fields, and the requested `reports` of its parts by name.

    A report is `[B T R ...]`, with one entry for each of the R parts that report it, in the order of the layers. Where
    parts report different numbers of values, such as router logits of more or fewer experts, -inf follows the fewer.
    """

    reports: dict[str, Tensor] | None = None


class PotstillModel(_PotstillPreTrainedModel):
    """A `Backbone` with the arguments and outputs of stock models without a head."""

    def __init__(self, config: PotstillConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(config.to_blueprint())
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "_ T"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_reports: Sequence[str] = (),
    ) -> PotstillModelOutput:
        """The last hidden states `[B T D]`, after the final norm.

        `hidden_states` are the embeddings and each layer's output, the last one after the final norm. It caches only
        with `past_key_values` or `use_cache`. `output_reports` names the reports to return. `attention_mask [B S]`
        marks padding; a mask `[B 1 T S]` holds the distances from each token to the keys that it sees (`Positions`).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("give exactly one of input_ids and inputs_embeds")
        if use_cache and past_key_values is None:
            past_key_values = Cache(layers=self.backbone.make_states())
        embeddings = self.backbone.embed(input_ids) if inputs_embeds is None else inputs_embeds
        states: Sequence[State] | None = None if past_key_values is None else past_key_values.layers
        if position_ids is None:
            past_length = states[0].get_seq_length() if states else 0
            position_ids = torch.arange(past_length, past_length + embeddings.shape[1], device=embeddings.device)[None]
        position_ids = position_ids.expand(len(embeddings), -1)
        distances, token_mask = _read_attention_mask(attention_mask)
        reports: dict[str, list[Tensor]] = {name: [] for name in output_reports}
        residuals = self.backbone.residuals(
            None,
            position_ids,
            states,
            token_mask=token_mask,
            distances=distances,
            inputs_embeds=embeddings,
            reports=reports,
        )
        hidden_states = [*residuals] if output_hidden_states else [_get_last_item(residuals)]
        hidden_states[-1] = self.backbone.norm(hidden_states[-1])
        return PotstillModelOutput(
            last_hidden_state=hidden_states[-1],
            past_key_values=past_key_values,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            reports={name: _stack_reports(values) for name, values in reports.items()} or None,
        )

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.backbone.embed


class PotstillForCausalLM(_PotstillPreTrainedModel, GenerationMixin):
    """A `Backbone` as a Hugging Face model: it saves, loads, generates with a cache, and trains in a `Trainer`."""

    def __init__(self, config: PotstillConfig) -> None:
        super().__init__(config)
        self.model = PotstillModel(config)
        self.post_init()

    @property
    def backbone(self) -> Backbone:
        """The network itself."""
        return self.model.backbone

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "_ T"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Int[Tensor, " N"] = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits `[B T V]` and, with `labels`, their loss; the arguments have the same meaning as in stock models."""
        backbone_output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        rows = backbone_output.last_hidden_state[:, slice_indices]
        logits = self.backbone.head().logits(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        loss = None
        if labels is not None:
            vocabulary = self.backbone.blueprint.vocabulary
            loss = self.loss_function(logits, labels, vocabulary, num_items_in_batch=num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=backbone_output.past_key_values,
            hidden_states=backbone_output.hidden_states,
        )
        return output.to_tuple() if return_dict is False else output

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.backbone.embed

    def get_output_embeddings(self) -> nn.Module:
        """The module whose weight gives the logits: the head, or the embedding where they are tied."""
        return self.backbone.embed if self.backbone.blueprint.tied else self.backbone.head

    def resize_token_embeddings(self, *sizes: Any, **options: Any) -> NoReturn:
        """Always raises, because the vocabulary is part of the blueprint.

        Raises:
            UnsupportedModel: always.
        """
        raise UnsupportedModel("a potstill model's vocabulary is fixed by its blueprint; make a new one by a transform")

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """Gives `generate` a cache of potstill's states, unless it has a cache or another `cache_implementation`."""
        has_cache = model_kwargs.get("past_key_values") is not None
        implementation = generation_config.cache_implementation
        if has_cache or generation_config.use_cache is False or implementation not in (None, "dynamic"):
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
            return
        cache = Cache(layers=self.backbone.make_states())
        if generation_config.is_assistant:  # its drafts are taken back
            record(cache)
        model_kwargs["past_key_values"] = cache


def _stack_reports(values: Sequence[Tensor]) -> Tensor:
    return stack_ragged(values, 2, padding=-torch.inf) if values[0].ndim > 2 else torch.stack(list(values), 2)


def _get_last_item(items: Any) -> Tensor:
    *_, item = items
    return item


def _read_attention_mask(attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(distances, token mask), of which at most one is not None."""
    if attention_mask is None:
        return None, None
    if attention_mask.ndim == 4 and attention_mask.dtype == torch.long:
        return attention_mask[:, 0], None
    if attention_mask.ndim != 2:
        raise UsageError(f"the attention mask has shape {tuple(attention_mask.shape)}; only [B T] marks padding here")
    return None, attention_mask.bool()


AutoConfig.register(PotstillConfig.model_type, PotstillConfig, exist_ok=True)
AutoModel.register(PotstillConfig, PotstillModel, exist_ok=True)
AutoModelForCausalLM.register(PotstillConfig, PotstillForCausalLM, exist_ok=True)
