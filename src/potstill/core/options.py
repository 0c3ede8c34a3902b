"""Options, each declared once: a dataclass has its default, help and type, and the command line reads them there.

A dataclass of options imports no torch, so that `potstill VERB --help` is quick. The configs of the stages inherit from
these dataclasses; Python, YAML files and cards therefore have the same names and defaults.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Option(Generic[T]):
    """The default and the help text of a field, for one field or for the same field of several dataclasses.

    `name` is the option's name where it differs from the field's. An `is_count` is written as `200k` or `60M` on the
    command line. An option that is not `on_command_line` can be set in Python and, if it is a number, in a YAML file.
    """

    default: T
    help: str
    name: str = ""
    is_count: bool = False
    on_command_line: bool = True

    def field(self) -> T:
        """A field of a dataclass: `data: str = DATA.field()`."""
        field: T = dataclasses.field(default=self.default, metadata={"option": self})
        return field


class OptionField(NamedTuple):
    """An option with its name, and the name and type of the field that declares it."""

    name: str
    field: str
    type: Any
    option: Option[Any]


def list_options(options_class: type) -> tuple[OptionField, ...]:
    """The options of a dataclass and of the dataclasses in its fields, in the order of the fields."""
    return tuple(_iterate_options(options_class))


def _iterate_options(options_class: Any) -> Iterator[OptionField]:
    for field in dataclasses.fields(options_class):
        if dataclasses.is_dataclass(field.type):
            yield from _iterate_options(field.type)
        elif option := field.metadata.get("option"):
            field_type: Any = field.type
            field_type = field_type | None if option.default is None else field_type  # None: chosen later
            yield OptionField(option.name or field.name, field.name, field_type, option)


def build_options(options_class: type[T], options: Mapping[str, Any]) -> T:
    """The dataclass, and those in its fields, with these values by name, and defaults for all others."""
    values = {}
    for field in dataclasses.fields(options_class):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(field.type):
            values[field.name] = build_options(field.type, options)  # type: ignore[arg-type]
            continue
        option = field.metadata.get("option")
        name = option.name or field.name if option else field.name
        if name in options:
            values[field.name] = options[name]
    return options_class(**values)


CONTEXT = Option(512, "Most tokens per window; a longer document does not fit in one window.")
SEED = Option(1, "Seed of all random numbers.")
DEVICE = Option("auto", "Where to compute: cpu, cuda, or auto (cuda if there is one).")
DTYPE = Option("auto", "Data type of matrix products: bfloat16, float32, or auto (the faster one here).")
ALLOW_PICKLE = Option(False, "Load pickled weights, which can run code.")
TRUST_REMOTE_CODE = Option(False, "Run code that comes with a model.")
IGNORE_GENERATION_CONFIG = Option(
    False, "Use none of the sampling defaults in the model's generation config (top_p, top_k, ...)."
)
DRAFT = Option[str | None](
    None,
    "Draft tokens for the model to verify, which changes no greedy text: with a smaller model, lookup, suffix, "
    "skip:LAYERS, exit:LAYERS, translated:MODEL, medusa:FOLDER or eagle:FOLDER.",
)
DRAFT_LENGTH = Option[str | None](
    None, "Tokens per draft: a number, confidence (or confidence:0.4), or cost (or cost:16), which finds what pays."
)
TREE = Option[str | None](None, "Draft a tree: the number of children of a node at each depth, such as 4,2,1.")
