"""Quantized model folders: named by their config, opened where their library is installed, and never trained.

Models of ours whose matrices are packed are quantized too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from potstill.core.errors import MissingDependency, UnsupportedModel
from potstill.models.edit_folder import refuse_edits
from potstill.models.folder_checks import read_json
from potstill.models.locate import locate_model

PACKED = "packed_"  # the kinds of our packed matrices begin so
# the packages that open the weights of a method; methods that are not here need none
PACKAGES = {
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "eetq",
    "gptq": "optimum gptqmodel",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "torchao": "torchao",
    "vptq": "vptq",
}


def read_quantization(folder: Path) -> str:
    """The method by which a folder's weights are quantized, such as `fp8` or `packed_ternary`; empty if they are not.

    Raises: UnsupportedModel for a method that transformers does not know, whose weights it would take as they are.
    """
    config = read_json(folder / "config.json")
    for part in (config, config.get("text_config") or {}):
        facts = part.get("quantization_config") or part.get("compression_config")
        if isinstance(facts, Mapping):
            return _check_method(folder, _get_method(facts))
    linear_kinds = (layer.get("linear", {}).get("kind", "") for layer in config.get("blueprint", {}).get("layers", ()))
    return next((kind for kind in linear_kinds if kind.startswith(PACKED)), "")


def check_trainable(name: str, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> None:
    """Refuse a quantized or edited model where a student is trained or pruned, before its weights are read.

    Raises: UnsupportedModel; NotFound and others as `locate_model` does.
    """
    path = locate_model(name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    refuse_edits(name, path)
    method = read_quantization(path) if path.is_dir() else ""
    if method:
        raise UnsupportedModel(
            f"{name} is quantized ({method}), so it can only be a --teacher; give the model in bfloat16 or float32 as "
            f"the student, or as the model to prune or convert"
        )


def explain_missing_package(path: Path, method: str, error: ImportError) -> MissingDependency:
    """The error that names the package without which `path` does not open."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if method in PACKAGES:
        return MissingDependency(f"{path} is quantized by {method}; run: pip install {PACKAGES[method]}")
    return MissingDependency(f"{path} needs a package that is not installed ({lines[0][:200]}); install it")


def _get_method(facts: Mapping[str, Any]) -> str:
    is_bitsandbytes = facts.get("load_in_8bit") or facts.get("load_in_4bit")  # its early configs name no method
    return str(facts.get("quant_method") or ("bitsandbytes" if is_bitsandbytes else "unnamed"))


def _check_method(folder: Path, method: str) -> str:
    methods = {*AUTO_QUANTIZATION_CONFIG_MAPPING, *PACKAGES}
    if method not in methods:
        raise UnsupportedModel(
            f"{folder} is quantized by a method that transformers does not know ({method}); give the model in another "
            f"format"
        )
    return method
