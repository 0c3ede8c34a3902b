"""Tiny targets and every registered drafter on them, for laws that hold for all."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from tests.decode.families import HYBRIDS, make_hybrid, make_stock_model
from tests.tiny import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from potstill.decode.draft_length import FixedLength
from potstill.decode.drafters.drafter import Drafter
from potstill.decode.drafters.eagle import EagleDrafter, FeatureDraft
from potstill.decode.drafters.medusa import MedusaDrafter, MedusaHeads
from potstill.decode.drafters.model_drafter import ModelDrafter
from potstill.decode.drafters.prompt_lookup import PromptLookup
from potstill.decode.drafters.suffix import SuffixDrafter
from potstill.decode.drafters.translated import TranslatedDrafter
from potstill.decode.runner import ModelRunner
from potstill.decode.speculative import Speculation
from potstill.models.layer_view import keep_layers
from potstill.models.signals import get_head

FAMILIES = ("llama", "qwen2", "gemma3_text")
WINDOW = {"sliding_window": 6}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, **WINDOW},
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        **WINDOW,
    },
}
SLOTS = 16
Build = Callable[[PreTrainedModel, Sequence[int]], Drafter]


@cache
def target_tokenizer() -> PreTrainedTokenizerFast:
    """ASCII letters as tokens, so that every text of tokens is text."""
    return byte_tokenizer(ascii=True)


@cache
def draft_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces of several letters, with a begin-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the pot still distils the spirit of the mash"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_target(family: str, *, vocabulary: int | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of `FAMILIES` or `HYBRIDS`; by default it speaks `target_tokenizer`."""
    size = len(target_tokenizer()) if vocabulary is None else vocabulary
    if family in HYBRIDS:
        return make_hybrid(family, vocabulary=size, context=512, dtype=dtype)
    model = make_stock_model(family, {"vocab_size": size, "max_position_embeddings": 512, **CHANGES[family]})
    return model.to(dtype)


def make_draft(target: PreTrainedModel, *, noise: float = 0.1) -> PreTrainedModel:
    """The target with noise on its weights, which agrees with it now and then."""
    draft = type(target)(target.config).to(target.dtype).eval()
    draft.load_state_dict(target.state_dict())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in (weight for weight in draft.parameters() if weight.numel() > 1):
            weight += noise * weight.std() * torch.randn(weight.shape, generator=generator).to(weight)
    return draft


def make_runner(model: PreTrainedModel) -> ModelRunner:
    return ModelRunner(model, vocabulary=model.config.vocab_size, slots=SLOTS)


def build_reduced(target: PreTrainedModel, widths: Sequence[int]) -> Drafter:
    """A model that scores every other token alone."""
    vocabulary = target.config.vocab_size
    runner = ModelRunner(
        make_draft(target), vocabulary=vocabulary, slots=SLOTS, token_ids=torch.arange(1, vocabulary, 2)
    )
    return ModelDrafter(runner, widths=widths)


def build_translated(target: PreTrainedModel, widths: Sequence[int]) -> Drafter:
    draft = make_target("llama", vocabulary=len(draft_tokenizer()), dtype=target.dtype)
    return TranslatedDrafter(
        make_runner(draft),
        draft_tokenizer(),
        target_tokenizer(),
        vocabulary=target.config.vocab_size,
        widths=(1,) * len(widths),
    )


def build_medusa(target: PreTrainedModel, widths: Sequence[int]) -> Drafter:
    heads = MedusaHeads(target.config.hidden_size, 3).to(target.dtype)
    for weight in heads.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return MedusaDrafter(heads, get_head(target), widths=widths)


def build_eagle(target: PreTrainedModel, widths: Sequence[int]) -> Drafter:
    hidden = target.config.hidden_size
    draft = FeatureDraft(hidden=hidden, num_heads=4, intermediate=48, context=512).to(target.dtype).eval()
    return EagleDrafter(draft, target, vocabulary=target.config.vocab_size, widths=widths)


BUILDS: dict[str, Build] = {
    "model": lambda target, widths: ModelDrafter(make_runner(make_draft(target)), widths=widths),
    "translated": build_translated,
    "lookup": lambda target, widths: PromptLookup(),
    "suffix": lambda target, widths: SuffixDrafter(tree=max(widths) > 1),
    "skip": lambda target, widths: ModelDrafter(make_runner(keep_layers(target, [1])), widths=widths),
    "exit": lambda target, widths: ModelDrafter(make_runner(keep_layers(target, [0])), widths=widths),
    "medusa": build_medusa,
    "eagle": build_eagle,
    "reduced": build_reduced,
}
VARIANTS = ("reduced",)  # of a registered drafter, without a row in the registry
CHOSEN = ("lookup", "translated", "suffix", "medusa")  # drafts that are a fixed choice, also where texts are sampled
DRAWN = ("model", "skip", "exit", "eagle", *VARIANTS)


def make_speculation(
    name: str, target: PreTrainedModel, widths: Sequence[int], *, typical: bool = False
) -> Speculation:
    """A registered drafter on a target, with a draft of these widths."""
    torch.manual_seed(5)
    drafter = BUILDS[name](target, widths)
    return Speculation(drafter=drafter, length=FixedLength(len(widths)), siblings=max(widths), typical=typical)
