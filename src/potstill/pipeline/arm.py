"""An arm of an arena: what one contestant does otherwise than the others, as a value and as a line of text."""

import re
from dataclasses import dataclass, replace

from potstill.core.errors import UsageError
from potstill.objectives.named import Mixture
from potstill.pipeline.distill import Distill

SETTINGS = ("cross_entropy", "temperature", "lr")  # what an arm may set for itself, after an @
GOES_ON = re.compile(r"\w+=")  # a piece between commas that belongs to the arm before it


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A contestant: its name, which is what was asked for, its objective, and the peak rate that it learns at."""

    name: str
    objective: Mixture
    learning_rate: float

    @classmethod
    def parse(cls, text: str, common: Distill) -> "Arm":
        """`NAME[:OPTION=VALUE,...][@SETTING=VALUE,...]`, where `common` says what the text leaves open.

        `jsd:beta=0.3@cross_entropy=0.5,lr=1e-4` is one. Raises: UsageError.
        """
        objective, _, settings = text.partition("@")
        given = _numbers(settings, text)
        mixture = Mixture.parse(
            objective,
            cross_entropy=given.get("cross_entropy", common.objective.cross_entropy),
            temperature=given.get("temperature", common.objective.temperature),
        )
        rate = given.get("lr", common.settings.learning_rate)
        replace(common.settings, learning_rate=rate)  # refuses one that is none
        return cls(name=text, objective=mixture, learning_rate=rate)

    def stage(self, common: Distill, *, student: str | None, tokens: int, seed: int) -> Distill:
        """The training of this arm: `common` with its objective and rate, from `student` (or cut, as `common` says)."""
        settings = replace(common.settings, learning_rate=self.learning_rate, tokens=tokens, seed=seed)
        own = replace(common, objective=self.objective, settings=settings)
        return own if student is None else replace(own, student=student, keep=None, params=None)

    @property
    def place(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[^\w.-]+", "-", self.name)


def split(text: str) -> tuple[str, ...]:
    """`a,b:x=1,y=2,c` as `a`, `b:x=1,y=2` and `c`: a piece like `y=2` goes on with the arm before it."""
    found: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if found and GOES_ON.match(piece):
            found[-1] += f",{piece}"
        elif piece:
            found.append(piece)
    return tuple(found)


def _numbers(text: str, arm: str) -> dict[str, float]:
    """`lr=1e-4,temperature=2` as numbers by name."""
    found: dict[str, float] = {}
    for piece in filter(None, text.split(",")):
        name, _, value = piece.partition("=")
        if name not in SETTINGS:
            raise UsageError(f"the arm {arm!r} has no setting {name!r}; after an @ it takes {', '.join(SETTINGS)}")
        try:
            found[name] = float(value)
        except ValueError as error:
            raise UsageError(f"the arm {arm!r} sets {name} to {value!r}, which is no number") from error
    return found
