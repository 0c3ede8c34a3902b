"""Builds a reward from its name: `accuracy`, `0.9*accuracy+0.1*language`, `format:minimum=200`, or FILE.py:NAME."""

import math
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from hashlib import sha256
from importlib import import_module
from inspect import isclass
from pathlib import Path
from typing import Any, cast

from potstill.core.errors import UsageError
from potstill.core.suggestions import suggest
from potstill.core.user_file import USER_SYMBOL, load_user_symbol, read_user_file
from potstill.train.rewards.base import (
    TIME_LIMIT,
    Judge,
    Reward,
    RewardSpec,
    list_options,
    list_registered_specs,
)
from potstill.train.rewards.weighted import RewardSum, RewardTerm

PLUS = re.compile(r"(?<!\d[eE])\+")  # a plus that is not part of a number such as 1e+3
TERM = re.compile(r"(?:(?P<weight>[^*:]*)\*)?(?P<name>.+?\.py:\w+|[^:]+)(?::(?P<options>.*))?")
JUDGE_OPTION = "judge"  # the option whose value is the address of a language model
FLAG = "--reward"
SWITCHES = {"1": True, "true": True, "0": False, "false": False}

JudgeOpener = Callable[[str], Judge]


@cache
def list_rewards() -> Mapping[str, RewardSpec]:
    """Every reward of potstill, by name: those that the files of this package register."""
    folder = Path(__file__).parent
    for file in sorted(folder.glob("*.py")):
        if "\n@register_reward(" in file.read_text("utf-8"):
            import_module(f"potstill.train.rewards.{file.stem}")
    return dict(sorted(list_registered_specs().items()))


def get_reward(text: str, *, open_judge: JudgeOpener | None = None, time_limit: float = TIME_LIMIT) -> RewardSum:
    """The reward that `text` describes: one, or a sum of several with their weights.

    `open_judge` opens a language model by its address, for rewards with the option `judge`. Each term has `time_limit`
    seconds for a call.

    Raises: UsageError for an unknown reward or option, or a value that does not fit; NotFound for a file that does not
        exist; MissingDependency for a package that a reward needs.
    """
    terms = tuple(_build_term(part.strip(), open_judge) for part in PLUS.split(text))
    names = [term.name for term in terms]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{FLAG} {text!r} has {duplicates[0]!r} twice; give it once, with a larger weight")
    return RewardSum(terms, time_limit)


def _build_term(text: str, open_judge: JudgeOpener | None) -> RewardTerm:
    match = TERM.fullmatch(text)
    if match is None:
        raise UsageError(f"{FLAG} {text!r} is not NAME, WEIGHT*NAME or NAME:OPTION=VALUE, such as 0.9*accuracy")
    weight = _parse_weight(match["weight"], text)
    spec, digest = _find_spec(match["name"].strip())
    options = _parse_options(spec, match["options"] or "")
    if options.get(JUDGE_OPTION):
        if open_judge is None:
            raise UsageError(f"the reward {spec.name} cannot open a judge here; omit {JUDGE_OPTION}")
        options[JUDGE_OPTION] = open_judge(options[JUDGE_OPTION])
    return RewardTerm(name=spec.name, reward=spec.build(**options), weight=weight, columns=spec.columns, digest=digest)


def _parse_weight(text: str | None, term: str) -> float:
    try:
        weight = 1.0 if text is None else float(text)
    except ValueError as error:
        raise UsageError(f"{FLAG} {term!r} begins with no number; write a weight such as 0.9*accuracy") from error
    if not math.isfinite(weight):
        raise UsageError(f"{FLAG} {term!r} has the weight {weight}; write a finite one such as 0.9*accuracy")
    return weight


def _find_spec(name: str) -> tuple[RewardSpec, str]:
    """The spec of a reward, and the SHA-256 of the file of a user's.

    Raises: UsageError, NotFound.
    """
    rewards = list_rewards()
    if name in rewards:
        return rewards[name], ""
    if match := USER_SYMBOL.fullmatch(name):
        digest = sha256(read_user_file(match["file"], flag=FLAG)).hexdigest()
        return make_user_spec(match["symbol"], load_user_symbol(name, flag=FLAG)), digest
    raise UsageError(
        f"there is no reward {name!r}{suggest(name, rewards)}; choose one of {', '.join(rewards)}, or give FILE.py:NAME"
    )


def make_user_spec(name: str, function: Callable[..., Any]) -> RewardSpec:
    """The spec of a user's reward: a function of completions, or a class whose objects are such functions.

    Its keyword arguments with defaults are its options.
    """

    def build(**options: Any) -> Reward:
        if isclass(function):
            return cast(Reward, function(**options))
        return partial(function, **options)

    return RewardSpec(name, (function.__doc__ or "").partition("\n")[0], build, list_options(function))


def _parse_options(spec: RewardSpec, text: str) -> dict[str, Any]:
    """The options that `minimum=200,detector=langdetect` states, each of the type of its default.

    Raises: UsageError.
    """
    options: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, _, value = (part.strip() for part in pair.partition("="))
        if name not in spec.options:
            raise UsageError(
                f"the reward {spec.name} has no option {name!r}{suggest(name, spec.options)}; it has "
                f"{', '.join(spec.options) or 'none'}"
            )
        if name in options:
            raise UsageError(f"the reward {spec.name} sets {name!r} twice; set it once")
        options[name] = _parse_value(spec, name, value)
    return options


def _parse_value(spec: RewardSpec, name: str, value: str) -> Any:
    default = spec.options[name]
    if isinstance(default, bool):
        if value.lower() not in SWITCHES:
            raise UsageError(f"the reward {spec.name} has {name}={value!r}; give {name}=1 or {name}=0")
        return SWITCHES[value.lower()]
    parse = type(default) if isinstance(default, int | float) else str
    try:
        return parse(value)
    except ValueError as error:
        raise UsageError(
            f"the reward {spec.name} has {name}={value!r}; give a number such as {name}={default}"
        ) from error
