"""Loads a user's own objectives: from a file (`--objective FILE.py:NAME`), a package, or a Python call.

NAME is a divergence function or a class. A package names it under the entry points `potstill.objectives`, and then
`--objective NAME` takes it. `distill(objective=NAME)` takes the function or class itself.

A divergence is a plain function (teacher's logits [N V], student's logits [N V]) -> [N], as those of `ops.divergence`.
Its keyword arguments are its options. It runs eagerly under autograd, a few rows at a time, without a fused kernel.
Under `@declare_facts(is_f_divergence=True)` it also learns from partial distributions of a cache or server.

A class is an `Objective`. Its keyword arguments with numeric defaults are its options. An argument called `pair` gets
the `PairInfo` of both models, one called `temperature` the temperature. Class attributes with the names of
`ObjectiveSpec`'s fields (`uses_teacher`, `needs_teacher_model`, `supports_cross_tokenizer`, ..., and `cost`) override
the defaults.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from inspect import Parameter, getsource, getsourcefile, isclass, signature
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from potstill.core.errors import UsageError
from potstill.core.notes import print_warning
from potstill.core.types import Objective
from potstill.core.user_file import USER_SYMBOL, load_user_symbol, read_user_file
from potstill.objectives.logit_distillation import logit_distillation_cost, make_divergence_spec
from potstill.objectives.model_info import PairInfo
from potstill.objectives.spec import ObjectiveOptions, ObjectiveSpec
from potstill.ops.divergence import DIVERGENCES, Divergence

OBJECTIVE_FLAG = "--objective"
PLUGIN_GROUP = "potstill.objectives"  # the entry points of packages that bring an objective
ObjectiveSource: TypeAlias = str | Callable[..., Any]
_CALLABLES: dict[str, Callable[..., Any]] = {}  # what Python calls gave as `objective`, by name
DIGEST_OPTION = "sha256"  # the option under which a card keeps the digest of the file
CLASS_FACTS = ("uses_teacher", "needs_teacher_model", "supports_same_tokenizer", "supports_cross_tokenizer")
PASSED_ARGUMENTS = ("pair", "temperature")  # arguments of a class that are no options
ZERO_TOLERANCE = 1e-4  # nats; a divergence above it for equal rows gets a warning


def is_user_objective(name: str) -> bool:
    """Whether the name has the form FILE.py:NAME, or is that of another package's objective."""
    return USER_SYMBOL.fullmatch(name) is not None or name in list_plugins()


@cache
def list_plugins() -> Mapping[str, EntryPoint]:
    """The objectives of installed packages, by name; a divergence of potstill keeps its name."""
    return {plugin.name: plugin for plugin in entry_points(group=PLUGIN_GROUP) if plugin.name not in DIVERGENCES}


def name_objective(objective: ObjectiveSource) -> str:
    """The name of an objective; a function or class gets the name FILE.py:NAME of its own file.

    Raises: UsageError for an object without a name of its own, such as a lambda.
    """
    if isinstance(objective, str):
        return objective
    symbol = getattr(objective, "__name__", "")
    if not callable(objective) or not symbol.isidentifier():
        raise UsageError(f"{objective!r} is no objective; give a name, a function defined with def, or a class")
    name = f"{_find_file_name(objective)}:{symbol}"
    _CALLABLES[name] = objective
    return name


def _find_file_name(objective: Callable[..., Any]) -> str:
    """The file of a function below the working folder, else the bare name; `memory.py` for one of a console."""
    file = _find_source_file(objective)
    if file is None or file.suffix != ".py":
        return "memory.py"
    return str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else file.name


def _find_source_file(objective: Callable[..., Any]) -> Path | None:
    try:
        file = Path(getsourcefile(objective) or "")
    except TypeError:  # of a console
        return None
    return file.resolve() if file.is_file() else None


def _read_source(objective: Callable[..., Any]) -> bytes:
    """The file of a function or class; of a console its text, or else its bytecode."""
    if file := _find_source_file(objective):
        return file.read_bytes()
    try:
        return getsource(objective).encode()
    except (OSError, TypeError):
        code = getattr(objective, "__code__", None)
        return repr(objective).encode() if code is None else code.co_code + repr(code.co_consts).encode()


def compute_digest(name: str) -> str:
    """The SHA-256 of the file that defines a user's objective, in hexadecimal.

    Raises: NotFound if there is no such file.
    """
    if name in _CALLABLES or name in list_plugins():
        return sha256(_read_source(load_symbol(name))).hexdigest()
    return sha256(read_user_file(_split_name(name)[0], flag=OBJECTIVE_FLAG)).hexdigest()


def get_label(name: str) -> str:
    """The name of an objective's term: NAME of FILE.py:NAME, and any other name as it is."""
    return _split_name(name)[1] if USER_SYMBOL.fullmatch(name) else name


def load_symbol(name: str) -> Callable[..., Any]:
    """The function or class of a user's objective; a file runs once for each content.

    Raises: NotFound if there is no such file; UsageError if it fails to run or does not define the name.
    """
    if name in _CALLABLES:
        return _CALLABLES[name]
    if name in list_plugins():
        return _load_plugin(list_plugins()[name])
    return load_user_symbol(name, flag=OBJECTIVE_FLAG)


def _load_plugin(plugin: EntryPoint) -> Callable[..., Any]:
    try:
        value = plugin.load()
    except Exception as error:
        raise UsageError(
            f"the objective {plugin.name} of the entry point {plugin.value} does not load: {type(error).__name__}: "
            f"{error}; fix or uninstall its package"
        ) from error
    if not callable(value):
        raise UsageError(f"the entry point {plugin.value} is no function or class; correct it in its package")
    return cast(Callable[..., Any], value)


def load_divergence(name: str) -> Divergence | None:
    """The checked divergence function of FILE.py:NAME; None if the name is a class."""
    value = load_symbol(name)
    if isclass(value):
        return None
    _check_divergence(value, name)
    return value


def make_user_spec(name: str) -> ObjectiveSpec:
    """The spec of FILE.py:NAME.

    Raises: UsageError if the function is no divergence.
    """
    divergence = load_divergence(name)
    if divergence is not None:
        return make_divergence_spec(name, divergence)
    cls = load_symbol(name)
    numbers = {
        parameter.name: float(parameter.default)
        for parameter in signature(cls).parameters.values()
        if parameter.name not in PASSED_ARGUMENTS and isinstance(parameter.default, int | float)
    }
    return ObjectiveSpec(
        name=name,
        help=(cls.__doc__ or "").partition("\n")[0],
        build=partial(_build_class, cls),
        cost=getattr(cls, "cost", logit_distillation_cost),
        numeric_options=numbers,
        **{fact: getattr(cls, fact) for fact in CLASS_FACTS if hasattr(cls, fact)},
    )


def _build_class(cls: Callable[..., Any], pair: PairInfo | None, options: ObjectiveOptions) -> Objective:
    values = {"pair": pair, "temperature": options.temperature}
    passed = {name: values[name] for name in PASSED_ARGUMENTS if name in signature(cls).parameters}
    objective = cls(**options.numeric_options, **passed)
    if not isinstance(objective, Objective):
        raise UsageError(
            f"{options.name} is no objective; give its class additive, weights, needs, counts and __call__ "
            "(potstill.core.types.Objective)"
        )
    return objective


def _split_name(name: str) -> tuple[str, str]:
    match = USER_SYMBOL.fullmatch(name)
    assert match is not None
    return match["file"], match["symbol"]


@cache
def _check_divergence(divergence: Divergence, name: str) -> None:
    """Refuse a function that is no divergence of rows; warn if equal rows do not give 0.

    Raises: UsageError.
    """
    required = [p.name for p in signature(divergence).parameters.values() if p.default is Parameter.empty]
    if len(required) != 2:
        raise UsageError(f"{name} requires {len(required)} arguments; it gets the teacher's and the student's logits")
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(3, 8, generator=generator) for _ in range(2))
    student.requires_grad_()
    try:
        values = divergence(teacher, student)
        if not isinstance(values, Tensor) or values.shape != (3,) or not values.isfinite().all():
            raise UsageError(f"{name} must return one finite number for each row: [N] of logits [N V]")
        (gradient,) = torch.autograd.grad(values.sum(), student, allow_unused=True)
        row, zero = divergence(teacher[:1], student[:1]), divergence(teacher, teacher)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{name} fails on small logits: {type(error).__name__}: {error}; fix it") from error
    if not torch.allclose(row, values[:1], rtol=1e-3, atol=1e-5):
        raise UsageError(f"{name} mixes rows; compute each row from its own logits only")
    if gradient is None or not gradient.isfinite().all() or not gradient.any():
        raise UsageError(f"{name} gives the student's logits no finite gradient; compute it from them in PyTorch")
    if zero.abs().max() > ZERO_TOLERANCE:
        print_warning(f"{name} is {zero.abs().max().item():.2g} for equal logits, so its minimum is not the teacher")
