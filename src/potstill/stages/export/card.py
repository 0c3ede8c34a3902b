"""The card of an exported model: where it comes from, how to run it, and what was compared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from potstill.core.atomic_files import write_text
from potstill.core.card import Card
from potstill.stages.card_usage import SavedFacts, format_usage
from potstill.stages.export.commands import format_commands
from potstill.stages.public_names import get_public_name, hide_folders

FORMATS = {
    "hf": "a stock folder, for transformers and vLLM",
    "gguf": "a GGUF file, for llama.cpp and Ollama",
    "onnx": "ONNX graphs, for ONNX Runtime",
    "openvino": "OpenVINO graphs",
}
LIBRARIES = {"hf": "transformers", "gguf": "gguf", "onnx": "onnx", "openvino": "openvino"}


def write_export_card(folder: Path, card: Card, *, title: str, commands: Mapping[str, str], snippet: str = "") -> None:
    """Write `card.json` and `README.md`; `snippet` is Python code that runs the model."""
    card.write(folder)
    target = card.stage["to"]
    origin = card.parents[0]
    facts = SavedFacts.from_folder(folder) if target == "hf" else None
    usage = snippet or (format_usage(title, facts, transformers_version=card.versions["transformers"]) if facts else "")
    license_name = origin.licence or "not stated; ask its authors before you share this"
    parts = [
        _format_front_matter(card, target),
        f"# {title}",
        f"`{get_public_name(origin.name)}` as {FORMATS[target]} ({card.details['type']}), written by potstill.",
        f"- exported from: `{get_public_name(origin.name)}` (license: {license_name}; SHA-256 `{origin.digest}`)",
    ]
    parts += ["## Use\n\n" + usage] if usage else []
    parts += ["## Serve", format_commands(commands)] if commands else []
    parts += ["## Checks", _format_checks(card.invariants)] if card.invariants else []
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    parts += ["## Made by", f"```\n{hide_folders(card.command)}\n```\n\n{versions}."]
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def _format_checks(checks: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"- {check['name']}: {check['outcome']}" for check in checks)


def _format_front_matter(card: Card, target: str) -> str:
    origin = card.parents[0]
    is_quantized = card.details["type"] in ("q8_0", "q4_0")
    data = ModelCardData(
        base_model=origin.hub_id or None,
        base_model_relation=("quantized" if is_quantized else "finetune") if origin.hub_id else None,
        language=list(origin.languages) or None,
        library_name=LIBRARIES[target],
        license=origin.licence,
        pipeline_tag="text-generation",
        tags=["potstill"],
    )
    return f"---\n{data.to_yaml().strip()}\n---"
