"""What the formats of an export share: names, stop texts, the check of a draft, and a model with rounded weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from potstill.core.errors import UnsupportedModel, VocabularyMismatch
from potstill.decode.stop_tokens import list_stop_tokens
from potstill.models.backbone import Backbone
from potstill.models.edit_folder import refuse_edits
from potstill.models.families.registry import FAMILIES, export_model
from potstill.models.hf_causal_lm import PotstillForCausalLM
from potstill.models.load import LoadedModel
from potstill.models.locate import locate_model
from potstill.models.quantization import read_quantization
from potstill.models.tokenizers.vocabulary import PROBES
from potstill.stages.console import print_warning


def check_plain_weights(name: str, *, allow_pickle: bool, trust_remote_code: bool) -> None:
    """Refuse a quantized or edited model before its weights are read.

    Raises: UnsupportedModel; NotFound and others as `locate_model` does.
    """
    path = locate_model(name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    refuse_edits(name, path)
    if path.is_dir() and (method := read_quantization(path)):
        raise UnsupportedModel(
            f"{name} is quantized ({method}), and an export rounds the original weights; give the model in bfloat16 or "
            f"float32"
        )


def list_stop_strings(loaded: LoadedModel) -> list[str]:
    """The texts that end an answer."""
    return [str(loaded.tokenizer.convert_ids_to_tokens(i)) for i in list_stop_tokens(loaded.model, loaded.tokenizer)]


def is_own_or_known(model: PreTrainedModel) -> bool:
    """Whether a blueprint describes the model."""
    return isinstance(model, PotstillForCausalLM) or model.config.model_type in FAMILIES


def check_draft(draft: LoadedModel, target: LoadedModel) -> None:
    """Refuse a draft with another tokenizer, and warn of one that is no smaller than its target.

    Raises: VocabularyMismatch.
    """
    tables = [loaded.tokenizer.get_vocab() for loaded in (draft, target)]
    ids = [[loaded.tokenizer(text).input_ids for text in PROBES] for loaded in (draft, target)]
    if tables[0] != tables[1] or ids[0] != ids[1]:
        raise VocabularyMismatch(
            f"the draft {draft.name} has another tokenizer than {target.name}, and vLLM and llama.cpp need the same "
            f"one; give a draft that was pruned or trained from {target.name}"
        )
    sizes = [sum(p.numel() for p in loaded.model.parameters()) for loaded in (draft, target)]
    if sizes[0] >= sizes[1]:
        print_warning(
            f"the draft {draft.name} has {sizes[0]:,} parameters and {target.name} {sizes[1]:,}; it cannot save time"
        )


def make_reference(backbone: Backbone, weights: Mapping[str, Any]) -> PreTrainedModel:
    """A model of the same function with other weights, such as the rounded ones of a file, in float32."""
    copy = Backbone(backbone.blueprint)
    copy.load_state_dict(dict(weights))
    return export_model(copy.eval())


def count_bytes(folder: Path) -> int:
    """The bytes of all files in a folder, without those of folders inside it."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def get_name(out: Path) -> str:
    """The name of a model in commands and cards: that of its folder or file."""
    return out.resolve().name.removesuffix(".gguf")
