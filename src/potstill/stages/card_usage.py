"""The section of a model card that shows how to use the model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from potstill.core.card import BEFORE_TRAINING, Card
from potstill.core.measure_table import format_measure
from potstill.models.families.registry import FAMILIES, has_experts
from potstill.ops.divergence import DIVERGENCES, get_facts
from potstill.stages.export.commands import format_commands, list_folder_commands
from potstill.stages.public_names import get_public_name

STOCK_VERSION = "4.57"  # the oldest transformers that reads the folders of `FAMILIES` alike (models/saving.py)
STOCK_IMPORTS = "from transformers import AutoModelForCausalLM, AutoTokenizer"
OWN_IMPORTS = "from potstill import AutoModelForCausalLM\nfrom transformers import AutoTokenizer"
CHAT_INPUTS = """messages = [{{"role": "user", "content": "What is a pot still?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
TEXT_INPUTS = 'inputs = tokenizer("A pot still is", return_tensors="pt")'
USAGE = """```python
{imports}

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
{inputs}
output = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

Needs {requirement}. The weights are saved in {dtype}."""


class SavedFacts(NamedTuple):
    """What the files of a model folder say: its type, the dtype of its weights, and whether it has a chat template."""

    model_type: str
    dtype: str
    has_template: bool

    @classmethod
    def from_folder(cls, folder: Path) -> "SavedFacts":
        """The facts of a folder that `save_model_folder` wrote."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        has_template = (folder / "chat_template.jinja").is_file()
        return cls(str(config.get("model_type")), str(dtype), has_template)


def format_usage(name: str, facts: SavedFacts, *, transformers_version: str) -> str:
    """A snippet that generates with the model called `name`, and the versions that it needs.

    The snippet uses the chat template if there is one. `transformers_version` is the one that saved the model.
    """
    is_own = facts.model_type == "potstill"
    requirement = f"transformers {STOCK_VERSION if facts.model_type in FAMILIES else transformers_version} or newer"
    return USAGE.format(
        imports=OWN_IMPORTS if is_own else STOCK_IMPORTS,
        name=name,
        inputs=CHAT_INPUTS.format() if facts.has_template else TEXT_INPUTS,
        requirement=f"potstill, and {requirement}" if is_own else requirement,
        dtype=facts.dtype,
    )


def format_draft_usage(card: Card, *, title: str) -> str:
    """How to draft with a model that was trained to be accepted, and by which target; empty for any other model."""
    target = card.stage.get("teacher")
    stated = card.stage.get("objective")
    objective = stated.get("name", "") if isinstance(stated, Mapping) else ""
    names = (name for name, divergence in DIVERGENCES.items() if get_facts(divergence).is_for_drafts)
    if not isinstance(target, str) or not any(name in objective for name in names):
        return ""
    target_name = get_public_name(target)
    command = f"A draft of `{target_name}`:\n\n    potstill generate {target_name} --draft {title}"
    baselines = ("teacher", BEFORE_TRAINING)
    trained = [measure for name, measures in card.measures.items() if name not in baselines for measure in measures]
    acceptance = next((measure for measure in trained if measure.name == "acceptance"), None)
    if acceptance is None:
        return command
    return (
        f"{command}\n\nAt temperature 1, `{target_name}` accepts a drafted token with the probability "
        f"{format_measure(acceptance)}, measured on held-out text."
    )


def format_serving(name: str, facts: SavedFacts) -> list[str]:
    """The commands that serve the model called `name` with vLLM, llama.cpp and Ollama; none for other families."""
    if facts.model_type not in FAMILIES:
        return []
    commands = list_folder_commands(name, name=name, has_gguf=not has_experts(facts.model_type))
    return ["## Serve", format_commands(commands)]
