"""A GGUF file, checked in llama.cpp where it is installed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from potstill.core.errors import ArtifactError, UnsupportedModel
from potstill.core.screen import status
from potstill.decode.stop_tokens import list_stop_tokens
from potstill.evaluate.samples import tokenize_prompt
from potstill.models.backbone import Backbone
from potstill.models.families.registry import import_model
from potstill.models.gguf_export.architecture import EXPRESSIBLE
from potstill.models.gguf_export.file import ModelFacts, write_gguf
from potstill.models.gguf_export.tensors import round_weights_to
from potstill.models.load import LoadedModel
from potstill.ops.divergence import forward_kl
from potstill.stages.console import print_note
from potstill.stages.export import llama_cpp
from potstill.stages.export.greedy_check import (
    PROMPT,
    GreedyComparison,
    compare_logits,
    compute_logits,
    get_check_length,
)
from potstill.stages.export.shared import is_own_or_known, make_reference
from potstill.stages.stage import make_parent

LLAMA_CHECK, TOKENIZER_CHECK = "llama.cpp", "tokenizer in llama.cpp"
BLOCK_TYPES = ("q8_0", "q4_0")


def check_expressible(loaded: LoadedModel) -> None:
    """Refuse a model that no blueprint describes.

    Raises: UnsupportedModel.
    """
    if not is_own_or_known(loaded.model):
        raise UnsupportedModel(
            f"GGUF export does not know {loaded.model.config.model_type!r} models; {EXPRESSIBLE}: export with --to hf "
            f"and convert with llama.cpp's convert_hf_to_gguf.py"
        )


def export_gguf(loaded: LoadedModel, file: Path, *, file_type: str, check: bool) -> dict[str, Any]:
    """Write `file` and compare it with the model; the facts of the file and its checks.

    Raises: UnsupportedModel, UsageError as `write_gguf`; ArtifactError if llama.cpp computes something else.
    """
    check_expressible(loaded)
    if loaded.path.suffix == ".gguf":
        print_note(f"{loaded.name} was a GGUF file already, so its rounding stays, and another one is added")
    backbone = import_model(loaded.model)
    with status(f"writing {file_type}"):
        summary = write_gguf(
            file,
            backbone.blueprint,
            backbone.state_dict(),
            loaded.tokenizer,
            describe_origin(loaded),
            file_type=file_type,
            stop_tokens=list_stop_tokens(loaded.model, loaded.tokenizer),
        )
    if summary.context < backbone.blueprint.context:
        print_note(
            f"llama.cpp has no windows in {summary.architecture}, so the file's context is the window's "
            f"{summary.context:,} tokens"
        )
    if file_type in BLOCK_TYPES and "f16" in summary.tensors:
        print_note(f"{summary.tensors['f16']} matrices are stored as f16, since their rows are no multiple of 32")
    facts = {"type": file_type, "bytes": file.stat().st_size, **summary._asdict()}
    return {"facts": facts, "checks": check_file(loaded, backbone, file, file_type=file_type) if check else []}


def describe_origin(loaded: LoadedModel) -> ModelFacts:
    """What the file says about its origin."""
    parent = make_parent("exported from", loaded)
    name = parent.hub_id or Path(loaded.name).name
    return ModelFacts(name, loaded.license or "", parent.hub_id, parent.languages)


def check_file(loaded: LoadedModel, backbone: Backbone, file: Path, *, file_type: str) -> list[Mapping[str, Any]]:
    """The tokens and greedy text of llama.cpp beside ours with the weights of the file, or how to install it.

    The text is also compared with that of the original weights.

    Raises: ArtifactError if llama.cpp differs by more than its rounding.
    """
    if not llama_cpp.is_installed():
        note = f"not run: llama-cpp-python is not installed; run: {llama_cpp.INSTALL_COMMAND}"
        print_note(f"the check in llama.cpp is {note}")
        return [{"name": LLAMA_CHECK, "outcome": note}]
    ids = tokenize_prompt(PROMPT, loaded.tokenizer)
    length = get_check_length(loaded.model, ids)
    with status("comparing with llama.cpp"):
        with llama_cpp.open_file(file, context=len(ids) + length) as llama:
            differences = llama_cpp.list_token_differences(llama, loaded.tokenizer)
            tokens, logits = llama_cpp.write_greedy(llama, ids, length)
        reference = make_reference(backbone, round_weights_to(backbone.state_dict(), file_type))
        stored, original = (compute_logits(model, ids, tokens) for model in (reference, loaded.model))
    comparison = compare_logits(LLAMA_CHECK, tokens, logits, stored, rounding=llama_cpp.ROUNDING[file_type])
    if differences or not comparison.passed:
        reason = f"other ids for {differences[0]!r}" if differences else comparison.describe()
        raise ArtifactError(
            f"llama.cpp reads the file otherwise than potstill ({reason}); nothing was kept: --no-check exports all "
            f"the same, and please report this"
        )
    return [
        {"name": TOKENIZER_CHECK, "outcome": "equal ids on all probes"},
        {"name": LLAMA_CHECK, "outcome": comparison.describe(), **comparison.to_dict()},
        describe_quality(original, stored, tokens),
    ]


def describe_quality(original: Any, rounded: Any, tokens: list[int]) -> dict[str, Any]:
    """What the rounding of the weights changes on the text that llama.cpp wrote: equal tokens, and the mean KL."""
    divergence = float(forward_kl(*(torch.from_numpy(rows).double() for rows in (original, rounded))).mean())
    comparison: GreedyComparison = compare_logits("original", tokens, rounded, original, rounding=float("inf"))
    equal = len(tokens) if comparison.first_difference is None else comparison.first_difference
    return {
        "name": "original weights",
        "outcome": f"the first {equal} of {len(tokens)} greedy tokens equal, KL {divergence:.2g} nats a token",
        "equal_tokens": equal,
        "kl": divergence,
    }
