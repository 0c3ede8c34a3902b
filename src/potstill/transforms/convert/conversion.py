"""The interface of a conversion, its options, and the registry.

A conversion is one file `to_NAME.py` of this folder: a frozen dataclass under `@register_conversion("name", help=...)`.
Its fields are its options, each declared by `Option`. It is a `Transform` where the weights alone decide the result.
"""

import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, Union

from torch import Tensor

from potstill.core.blueprint import Blueprint
from potstill.core.errors import UsageError
from potstill.core.options import OptionField, list_options
from potstill.core.suggestions import suggest
from potstill.core.types import Batch, Weights
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone
from potstill.transforms.apply import apply_transform

CONVERSIONS: "dict[str, type[Conversion]]" = {}

ConversionType = TypeVar("ConversionType", bound="type[Conversion]")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Changes what layers are. Fields are options: numbers, texts, booleans, or numbers separated by `-`.

    `blueprint` alone decides the new architecture, so that it can be planned without weights. It refuses a model that
    it cannot convert, and one that is converted already. A conversion that `reads_text` gets calibration batches. With
    a `language_column` their documents carry the language that this column of the data names.
    """

    name: ClassVar[str] = ""
    help: ClassVar[str] = ""
    reads_text: ClassVar[bool] = False
    language_column: ClassVar[str | None] = None

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The new architecture.

        Raises:
            UsageError: the options do not fit `old`, or it has such layers already.
        """
        raise NotImplementedError

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """The weights of the new architecture, from those of `old`."""
        raise NotImplementedError

    def convert(self, model: Backbone, batches: Sequence[Batch]) -> tuple[Backbone, dict[str, Any]]:
        """The converted model, and the measurements behind it as plain data; `model` stays as it is.

        `batches` are packed calibration text if the conversion `reads_text`, else empty.
        """
        return apply_transform(self, model), {}

    def describe_options(self) -> dict[str, Any]:
        """The options with their values."""
        return {option.name: getattr(self, option.field) for option in list_options(type(self))}


def register_conversion(name: str, *, help: str) -> Callable[[ConversionType], ConversionType]:
    """Registers a conversion under the name that `--to` takes; `help` is one line.

    Raises:
        ValueError: two conversions have the same name.
    """

    def register(conversion: ConversionType) -> ConversionType:
        if name in CONVERSIONS:
            raise ValueError(f"two conversions are called {name!r}")
        conversion.name, conversion.help = name, help
        CONVERSIONS[name] = conversion
        return conversion

    return register


def build_conversion(conversion: type[Conversion], text: str) -> Conversion:
    """The conversion with the options of `text`, such as `experts=4,top_k=1`.

    Raises:
        UsageError: an option is unknown, given twice, or has a value of another type.
    """
    fields = {field.name: field for field in list_options(conversion)}
    values: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if name not in fields:
            names = sorted(fields)
            raise UsageError(
                f"{conversion.name} has no option {name!r}{suggest(name, names)}; it has {', '.join(names) or 'none'}"
            )
        if not equals or name in values:
            raise UsageError(f"--to {conversion.name} needs {name}=VALUE, once")
        values[fields[name].field] = _parse_value(conversion.name, fields[name], value)
    return conversion(**values)


def parse_layers(text: str | None, count: int) -> tuple[int, ...]:
    """The layers that `0-3-5` names, counted from 0, sorted and each once; all `count` layers without a text.

    Raises:
        UsageError: the text is no list of layers, or the model has no such layer.
    """
    if text is None:
        return tuple(range(count))
    try:
        layers = sorted({int(layer) for layer in text.split("-")})
    except ValueError as error:
        raise UsageError(f"{text!r} is no list of layers such as 0-3-5") from error
    if layers[-1] >= count:
        raise UsageError(f"there is no layer {layers[-1]}; the model's layers are 0 to {count - 1}")
    return tuple(layers)


def _parse_value(conversion: str, field: OptionField, text: str) -> Any:
    """The value of an option by the type of its field."""
    for value_type in _list_types(field.type):
        try:
            return _PARSERS[value_type](text)
        except (ValueError, KeyError):
            continue
    kinds = " or ".join(_NAMES[value_type] for value_type in _list_types(field.type))
    raise UsageError(f"--to {conversion}:{field.name}={text} is not {kinds}")


def _list_types(field_type: Any) -> tuple[type, ...]:
    """The types of a field that is not None."""
    is_union = typing.get_origin(field_type) in (Union, types.UnionType)
    return tuple(t for t in typing.get_args(field_type) if t is not type(None)) if is_union else (field_type,)


def repeat_shared_heads(weight: Tensor, mixer: Attention) -> Tensor:
    """Rows of keys or values `[G K D]`, flat, repeated for each query head that shares them: `[H K D]`, flat."""
    heads = weight.unflatten(0, (mixer.kv_heads, mixer.head_dim))
    return heads.repeat_interleave(mixer.heads // mixer.kv_heads, 0).flatten(0, 1)


_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
_PARSERS: dict[type, Callable[[str], Any]] = {
    bool: lambda text: _BOOLEANS[text.lower()],
    int: int,
    float: float,
    str: str,
}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
