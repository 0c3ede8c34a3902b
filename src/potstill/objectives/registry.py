"""All objectives by name: cross-entropy, the divergences, the registered methods, and those of users."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

from potstill.core.errors import UsageError
from potstill.core.suggestions import suggest
from potstill.objectives.cross_entropy import CROSS_ENTROPY, CROSS_ENTROPY_SPEC
from potstill.objectives.logit_distillation import make_divergence_spec
from potstill.objectives.spec import ObjectiveSpec, list_registered_specs
from potstill.objectives.user_file import is_user_objective, list_plugins, make_user_spec
from potstill.ops.divergence import DIVERGENCES

# The order in which help and errors list the files of registered objectives; files that are not named follow.
FILE_ORDER = (
    *("dskd", "dskdv2", "minillm", "uld", "mined", "spans", "tie_kd", "hidden_states", "attention_relations"),
    *("balance", "depth_load", "language_routing", "preference", "aligndistil"),
)


def _list_objective_files() -> list[str]:
    """The names of the files next to this one that register an objective."""
    folder = Path(__file__).parent
    names = sorted(file.stem for file in folder.glob("*.py") if "\n@register_objective(" in file.read_text("utf-8"))
    return sorted(names, key=lambda name: FILE_ORDER.index(name) if name in FILE_ORDER else len(FILE_ORDER))


def _load_specs() -> dict[str, ObjectiveSpec]:
    modules = [import_module(f"potstill.objectives.{name}") for name in _list_objective_files()]
    return {spec.name: spec for module in modules for spec in list_registered_specs(module.__name__)}


OBJECTIVE_SPECS: Mapping[str, ObjectiveSpec] = MappingProxyType(_load_specs())
TEXT_OPTIONS = frozenset(option for spec in OBJECTIVE_SPECS.values() for option in spec.text_options)


def list_objective_names() -> tuple[str, ...]:
    """Every name that `--objective` accepts; it also accepts FILE.py:FUNCTION."""
    return (CROSS_ENTROPY, *DIVERGENCES, *OBJECTIVE_SPECS, *list_plugins())


def find_spec(name: str) -> ObjectiveSpec:
    """The spec of an objective.

    Raises: UsageError if there is no such objective, or the file of a user does not define it.
    """
    if name == CROSS_ENTROPY:
        return CROSS_ENTROPY_SPEC
    if name in DIVERGENCES:
        return make_divergence_spec(name, DIVERGENCES[name])
    if name in OBJECTIVE_SPECS:
        return OBJECTIVE_SPECS[name]
    if is_user_objective(name):
        return make_user_spec(name)
    names = list_objective_names()
    raise UsageError(f"there is no objective {name!r}{suggest(name, names)}; choose one of {', '.join(names)}")
