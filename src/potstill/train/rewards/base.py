"""The interface of a reward, its registration, and checks of what it returns.

A reward is a function of completions that gives a number for each; more is better. It is a plain function of text, so
it knows neither tokens nor tensors:

    def brevity(completions: Sequence[Completion]) -> list[float]:
        return [1.0 if len(c.completion) < 100 else 0.0 for c in completions]

potstill's own rewards are one file each under `@register_reward`. `train.rewards.registry.get_reward` builds them, and
those of users (FILE.py:NAME), from their names.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

from potstill.core.errors import PotstillError, RewardFailed

TIME_LIMIT = 300.0  # seconds for one call of a reward

T = TypeVar("T")


class Completion(NamedTuple):
    """What a model wrote after a prompt.

    `row` is the row of the prompt in its data set, with columns such as `answer`, `language` and `solution`. `ended` is
    false where the completion was cut before a stop token; potstill's own rewards ignore it.
    """

    prompt: str
    completion: str
    row: Mapping[str, Any]
    ended: bool


Reward: TypeAlias = Callable[[Sequence[Completion]], Sequence[float]]
Judge: TypeAlias = Callable[[Sequence[str]], Sequence[str]]  # the replies of a language model to prompts


class RewardScores(NamedTuple):
    """The reward of each completion, and by name the values of every term that entered it, without weights."""

    totals: Sequence[float]
    terms: Mapping[str, Sequence[float]]


@runtime_checkable
class CompositeReward(Protocol):
    """A reward that is made of terms. `score_terms` also gives their values by name, which are logged."""

    def __call__(self, completions: Sequence[Completion]) -> Sequence[float]: ...
    def score_terms(self, completions: Sequence[Completion]) -> RewardScores: ...


class RewardSpec(NamedTuple):
    """The facts about a reward: its name, one line of help, its builder with the defaults of its options, and columns.

    Every row must have these `columns`.
    """

    name: str
    help: str
    build: Callable[..., Reward]
    options: Mapping[str, Any]
    columns: tuple[str, ...] = ()


_specs: dict[str, RewardSpec] = {}  # every registered reward, by name

Builder = TypeVar("Builder", bound=Callable[..., Reward])


def register_reward(name: str, *, help: str, columns: tuple[str, ...] = ()) -> Callable[[Builder], Builder]:
    """Decorate a class or a function that builds a reward, to register it under `name`.

    Its keyword arguments with defaults are the options of the reward on the command line.

    Raises: ValueError if two rewards have the same name.
    """

    def register(build: Builder) -> Builder:
        if name in _specs:
            raise ValueError(f"two rewards are called {name!r}")
        _specs[name] = RewardSpec(name, help, build, list_options(build), columns)
        return build

    return register


def list_registered_specs() -> dict[str, RewardSpec]:
    """The specs of all imported rewards, by name."""
    return dict(_specs)


def list_options(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword arguments of a function or class that have a default, with their defaults."""
    parameters = signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not Parameter.empty}


def score_completions(
    reward: Reward, completions: Sequence[Completion], *, name: str = "the reward", time_limit: float = TIME_LIMIT
) -> list[float]:
    """The rewards of completions, computed in at most `time_limit` seconds and checked by `check_rewards`.

    Raises: RewardFailed for a reward that raises, hangs, or returns no finite number for each completion.
    """
    return check_rewards(call_with_limit(reward, completions, name=name, time_limit=time_limit), len(completions), name)


def check_rewards(values: Any, count: int, name: str = "the reward") -> list[float]:
    """`values` as floats, if they are `count` finite numbers.

    Raises: RewardFailed.
    """
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        kind = type(values).__name__
        raise RewardFailed(f"{name} returns a {kind} that holds no numbers; return one for each completion") from error
    if len(numbers) != count:
        raise RewardFailed(f"{name} returns {len(numbers)} values for {count} completions; return one for each")
    if bad := [number for number in numbers if not math.isfinite(number)]:
        raise RewardFailed(f"{name} returns {bad[0]}; return a finite number for each completion")
    return numbers


def call_with_limit(
    function: Callable[[Sequence[Completion]], T], completions: Sequence[Completion], *, name: str, time_limit: float
) -> T:
    """`function(completions)`, computed in a thread of its own, because no other way can leave a call that hangs.

    Raises: RewardFailed for an exception and after `time_limit` seconds; the errors of potstill as they are.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function(completions))
        except BaseException as error:  # an exception in a thread is lost otherwise
            errors.append(error)

    thread = threading.Thread(target=run, name=f"potstill-{name}", daemon=True)
    thread.start()
    thread.join(time_limit)
    if thread.is_alive():
        raise RewardFailed(
            f"{name} gives no values for {len(completions)} completions within {time_limit:g} seconds; fix it, or "
            "score fewer completions at once"
        )
    for error in errors:
        if isinstance(error, PotstillError):
            raise error
        raise RewardFailed(f"{name} raises {type(error).__name__}: {error}; fix it") from error
    return results[0]
