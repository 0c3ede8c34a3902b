"""Checks the annotations of potstill while its tests run: types by beartype, shapes by jaxtyping.

`jaxtyped`, which the plugin of jaxtyping puts at every function, binds the arguments of each call, checks them twice,
and opens a scope for sizes even where no annotation has a shape. It is left to the few functions that need it.
"""

from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import wraps
from inspect import isclass, isfunction, isgeneratorfunction
from typing import Any, ForwardRef, Literal, get_args, get_origin

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

check_shapes = jaxtyping.jaxtyped
TYPE_ERRORS = BeartypeConf(violation_type=jaxtyping.TypeCheckError)  # a TypeError, as Python's own


def check_annotations(*, typechecker: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator of functions and dataclasses, in place of `jaxtyped`."""

    def decorate(checked: Any) -> Any:
        if isclass(checked):
            if is_dataclass(checked) and "__init__" in vars(checked):
                checked.__init__ = decorate(checked.__init__)
            return checked
        parts = [part for annotation in checked.__annotations__.values() for part in list_parts(annotation)]
        has_shapes = any(map(is_array, parts))
        if not isfunction(checked) or any(map(needs_arguments, parts)) or (has_shapes and isgeneratorfunction(checked)):
            return check_shapes(checked, typechecker=typechecker)
        return check_in_scope(checked) if has_shapes else check_types(checked)

    return decorate


def list_parts(annotation: Any) -> Iterator[Any]:
    """An annotation and its arguments."""
    yield annotation
    for argument in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from list_parts(argument)


def is_array(part: Any) -> bool:
    """Whether `part` has a shape."""
    return isclass(part) and issubclass(part, AbstractArray)


def needs_arguments(part: Any) -> bool:
    """Whether `part` computes a size from an argument, or is a name in quotes, which may be known to mypy alone."""
    return "{" in part.dim_str if is_array(part) else isinstance(part, str | ForwardRef)


def check_types(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which keeps the order of its unions: beartype writes one as it first met an equal one."""
    annotations = dict(function.__annotations__)
    checked = beartype(function, conf=TYPE_ERRORS)
    function.__annotations__ = checked.__annotations__ = annotations
    return checked


def check_in_scope(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, each call of which names sizes anew; unchecked where jaxtyping is disabled."""
    checked = check_types(function)

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **options)
        with check_shapes("context"):
            return checked(*args, **options)

    return call


jaxtyping.jaxtyped = check_annotations
