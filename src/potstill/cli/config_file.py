"""A YAML file of options, or a card, as options by their names on the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.core.errors import NotFound, UsageError


def flatten_options(content: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a file, or in the stage of a card, by their names on the command line."""
    if isinstance(content.get("stage"), Mapping):  # a whole card
        content = content["stage"]
    options = {name.replace("-", "_"): value for name, value in content.items() if name != "stage"}
    options |= options.pop("settings", None) or {}
    objective = options.get("objective")
    if isinstance(objective, Mapping):
        objective_options = ",".join(f"{name}={value}" for name, value in (objective.get("options") or {}).items())
        options |= {name: value for name, value in objective.items() if name not in ("name", "options")}
        options["objective"] = (
            f"{objective.get('name')}:{objective_options}" if objective_options else objective.get("name")
        )
    if "learning_rate" in options:
        options["lr"] = options.pop("learning_rate")
    return options


def read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {file}") from error
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"{file} must map option names to values, such as `tokens: 2M`")
    return content
