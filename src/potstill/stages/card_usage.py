"""The section of a model card that shows how to use the model."""

import json
from pathlib import Path
from typing import NamedTuple

from potstill.models.families.registry import FAMILIES

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
