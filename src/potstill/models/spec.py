"""A model's blueprint and tokenizer by name, without reading its weights."""

from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from potstill.core.blueprint import Blueprint
from potstill.core.elastic import find_size, read_sizes
from potstill.core.errors import ArtifactError, NotFound
from potstill.models import adapters, edit_folder, gguf
from potstill.models.families.registry import read_blueprint
from potstill.models.folder_checks import check_model_folder
from potstill.models.locate import locate_model, split_size


class ModelSpec(NamedTuple):
    """The blueprint and the tokenizer of a model, without its weights."""

    blueprint: Blueprint
    tokenizer: PreTrainedTokenizerBase


def read_model_spec(name: str | Path, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> ModelSpec:
    """The spec of the model called `name`, or of one of its sizes.

    Raises: UsageError for a size that the model has not; NotFound, UnsafeModel, ArtifactError as `load_model` does;
        UnsupportedModel for a family that no blueprint can describe.
    """
    model, share = split_size(name)
    if share is not None:
        spec = read_model_spec(model, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        size = find_size(read_sizes(spec.blueprint), share, model)
        return spec._replace(blueprint=size.blueprint(spec.blueprint))
    path = locate_model(name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if path.is_file():
        with gguf.cache_gguf_reads():
            return ModelSpec(read_blueprint(gguf.read_config(path)), gguf.load_tokenizer(path))
    for kind, is_kind in ((adapters, adapters.is_adapter_folder), (edit_folder, edit_folder.is_edit_folder)):
        if is_kind(path):
            base = kind.find_base(path)
            try:
                spec = read_model_spec(base, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
            except NotFound as error:
                raise kind.explain_missing_base(path, base, error) from error
            if kind is edit_folder and (template := edit_folder.read_chat_template(path)) is not None:
                spec.tokenizer.chat_template = template
            return spec
    check_model_folder(path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise ArtifactError(f"{path} has no readable config or tokenizer ({error}); copy the model again") from error
    return ModelSpec(read_blueprint(config), tokenizer)
