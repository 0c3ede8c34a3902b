"""An arm of an arena: what one contestant does otherwise than the others, as a value and as a line of text."""

import re
from dataclasses import dataclass, replace

from potstill.core.errors import UsageError
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.rollouts import check_rollout
from potstill.train.rollouts.config import RolloutConfig

NUMERIC_SETTINGS = ("cross_entropy", "temperature", "lr", "on_policy")
ARM_SETTINGS = (*NUMERIC_SETTINGS, "rollout")  # what an arm may set for itself, after an @
CARD_DOCUMENTS = 8  # documents that an arm's own card is measured on; all arms are measured together, on all documents
CONTINUATION = re.compile(r"\w+=")  # a piece between commas that belongs to the arm before it


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A contestant: its name, which is what was asked for, its objective, its peak rate, and who writes its text."""

    name: str
    objective: ObjectiveConfig
    learning_rate: float
    rollout: RolloutConfig

    @classmethod
    def parse(cls, text: str, common: DistillConfig) -> "Arm":
        """`NAME[:OPTION=VALUE,...][@SETTING=VALUE,...]`, where `common` says what the text leaves open.

        `jsd:beta=0.3@cross_entropy=0.5,lr=1e-4` is one, `reverse_kl@on_policy=0.5,rollout=distillm` another.

        Raises: UsageError.
        """
        objective, _, settings = text.partition("@")
        values = _parse_settings(settings, text)
        numbers = {name: _parse_number(name, values[name], text) for name in NUMERIC_SETTINGS if name in values}
        objective_config = ObjectiveConfig.parse(
            objective,
            cross_entropy=numbers.get("cross_entropy", common.objective.cross_entropy),
            temperature=numbers.get("temperature", common.objective.temperature),
        )
        learning_rate = numbers.get("lr", common.settings.learning_rate)
        train_config = replace(common.settings, learning_rate=learning_rate)  # refuses one that is none
        rollout = RolloutConfig(
            name=values.get("rollout", common.rollout), share=numbers.get("on_policy", common.on_policy)
        )
        check_rollout(rollout, objective_config, train_config, teacher=common.teachers[0].location, cache=None)
        return cls(name=text, objective=objective_config, learning_rate=learning_rate, rollout=rollout)

    def make_stage(self, common: DistillConfig, *, student: str | None, tokens: int, seed: int) -> DistillConfig:
        """The training of this arm: `common` with its objective and rate, from `student` (or cut, as `common` says)."""
        settings = replace(common.settings, learning_rate=self.learning_rate, tokens=tokens, seed=seed)
        rollout, documents = self.rollout, min(common.documents, CARD_DOCUMENTS)
        stage = replace(common, objective=self.objective, settings=settings, documents=documents)
        stage = replace(stage, on_policy=rollout.share, rollout=rollout.name)
        return stage if student is None else replace(stage, student=student, keep=None, params=None)

    def is_equivalent(self, other: "Arm") -> bool:
        """Whether both train alike, whatever they are called."""
        return replace(self, name="") == replace(other, name="")

    @property
    def folder_name(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[^\w.-]+", "-", self.name)


def split_arms(text: str) -> tuple[str, ...]:
    """`a,b:x=1,y=2,c` as `a`, `b:x=1,y=2` and `c`: a piece like `y=2` goes on with the arm before it."""
    arms: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if arms and CONTINUATION.match(piece):
            arms[-1] += f",{piece}"
        elif piece:
            arms.append(piece)
    return tuple(arms)


def _parse_settings(text: str, arm: str) -> dict[str, str]:
    """`lr=1e-4,rollout=gkd` as values by name."""
    settings: dict[str, str] = {}
    for assignment in filter(None, text.split(",")):
        name, _, value = assignment.partition("=")
        if name not in ARM_SETTINGS:
            raise UsageError(f"the arm {arm!r} has no setting {name!r}; after an @ it takes {', '.join(ARM_SETTINGS)}")
        if name in settings:
            raise UsageError(f"the arm {arm!r} sets {name} twice; set it once")
        settings[name] = value
    return settings


def _parse_number(name: str, value: str, arm: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UsageError(f"the arm {arm!r} sets {name} to {value!r}, which is no number") from error
