"""Checks of options that several stages share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.core.device import SAVE_DTYPES
from potstill.core.errors import UsageError
from potstill.core.suggestions import suggest
from potstill.models.locate import split_size
from potstill.train import distributed
from potstill.transforms.fit import AUTO, STRATEGIES


def check_size_options(sizes: Mapping[str, Any], *, has_alternative: bool = False) -> None:
    """Refuse anything except exactly one of `sizes` (option to value); with `has_alternative` also accept none.

    Raises: UsageError.
    """
    given_options = [f"--{name}" for name, value in sizes.items() if value is not None]
    if len(given_options) > 1 or not (given_options or has_alternative):
        options = [f"--{name}" for name in sizes]
        choices = f"{', '.join(options[:-1])} or {options[-1]}"
        raise UsageError(
            f"a size is needed: one of {choices}; you gave {' and '.join(given_options) or 'none of them'}"
        )
    keep, params = sizes.get("keep"), sizes.get("params")
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"--keep is {keep}; it is a share of the parameters, above 0 and at most 1")
    if params is not None and params < 1:
        raise UsageError(f"--params is {params}; it must be at least 1")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value outside `choices`.

    Raises: UsageError.
    """
    if value not in choices:
        raise UsageError(f"--{option} {value!r}{suggest(value, choices)} is none of {', '.join(choices)}")


def check_strategy(name: str) -> None:
    """Refuse an unknown pruning strategy.

    Raises: UsageError.
    """
    check_choice("strategy", name, (AUTO, *STRATEGIES))


def check_save_dtype(name: str) -> None:
    """Refuse a data type in which weights are not saved.

    Raises: UsageError.
    """
    check_choice("save-dtype", name, tuple(SAVE_DTYPES))


def check_output_not_input(out: Path, *inputs: str | None) -> None:
    """Refuse an output folder that contains one of the inputs.

    Raises: UsageError if one of `inputs` is the folder `out`, or is inside it.
    """
    target = out.expanduser().resolve()
    for name in inputs:
        source = Path(split_size(name).model).expanduser() if name else None
        if source is not None and source.exists() and target in (source.resolve(), *source.resolve().parents):
            raise UsageError(f"--out {out} would overwrite {name}, an input of this command; choose another folder")


def check_single_process() -> None:
    """Refuse torchrun with several processes, where each would write the same folder.

    Raises: UsageError.
    """
    if distributed.world_size() > 1:
        raise UsageError("only distill and align run in several processes; start this stage without torchrun")
