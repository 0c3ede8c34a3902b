"""The recipes by name: the files of this package.

Building a recipe imports torch, which takes seconds. The table of all recipes is therefore read from the text of their
files.
"""

import ast
import pkgutil
from pathlib import Path

import potstill.recipes

NO_RECIPES = ("listing", "options", "registry", "run")  # the other modules of this package
FACTS = ("name", "summary", "source")


def list_recipe_names() -> list[str]:
    """The names of all recipes."""
    module_names = (module.name for module in pkgutil.iter_modules(potstill.recipes.__path__))
    return sorted(name.replace("_", "-") for name in module_names if name not in NO_RECIPES)


def list_recipe_facts() -> list[dict[str, str]]:
    """Name, summary and source of every recipe: the texts in the call `Recipe(...)` of its file."""
    folder = Path(*potstill.recipes.__path__)
    return [_read_facts(folder / f"{name.replace('-', '_')}.py") for name in list_recipe_names()]


def _read_facts(file: Path) -> dict[str, str]:
    calls = (node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    keywords = next(call.keywords for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Recipe")
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in keywords if keyword.arg in FACTS}
