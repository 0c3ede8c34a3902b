"""Checks of a model in memory: that its weights are those that its config describes."""

import re
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from potstill.core.errors import ArtifactError

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def check_weights(path: Path, model: PreTrainedModel, *, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse a folder whose weights are not those that its config describes: layers, a head, or others that it lacks.

    Raises: ArtifactError.
    """
    config, missing = model.config.get_text_config(), set(missing)
    num_layers = int(getattr(config, "num_hidden_layers", 0))
    num_extra = int(getattr(config, "num_nextn_predict_layers", None) or 0)  # they predict further tokens, and may lack
    stored_layers = _find_layers(set(model.state_dict()) - missing)
    missing_layers = _find_layers(missing) - stored_layers
    surplus_layers = {layer for layer in _find_layers(unexpected) if layer >= num_layers + num_extra}
    if missing_layers or surplus_layers:
        num_stored = len(stored_layers | surplus_layers)
        raise ArtifactError(
            f"config.json in {path} says {num_layers} layers (num_hidden_layers), and the weights hold {num_stored}; "
            f"correct the config, or copy the weights again"
        )
    head, parameters = model.get_output_embeddings(), dict(model.named_parameters())
    if missing and head is not None and all(parameters.get(name) is head.weight for name in missing):
        raise ArtifactError(
            f"{path} holds no {min(missing)}, and its config.json does not share the head with the embedding; set "
            f'"tie_word_embeddings": true there if the model was trained so, or copy the weights again'
        )
    if missing:
        raise ArtifactError(f"{path} lacks {len(missing)} weights, such as {min(missing)}; copy the model again")


def untie_head(model: PreTrainedModel) -> bool:
    """Correct a config that shares head and embedding where the weights differ; whether it had to be corrected."""
    config, embedding, head = model.config, model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not config.get_text_config().tie_word_embeddings or embedding.weight is head.weight:
        return False
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return True


def _find_layers(names: Iterable[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := LAYER.search(name))}
