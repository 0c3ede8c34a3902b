"""An arm of an arena: the settings that differ from other arms, as a value and as text."""

import re
from dataclasses import dataclass, replace

from potstill.core.errors import UsageError
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.rollouts import check_rollout
from potstill.train.rollouts.config import RolloutConfig

NUMERIC_SETTINGS = ("cross_entropy", "temperature", "lr", "on_policy")
ARM_SETTINGS = (*NUMERIC_SETTINGS, "rollout")  # the settings that an arm may change, after an @
CARD_DOCUMENTS = 8  # documents for an arm's own card; the arena evaluates all arms together on all documents
CONTINUATION = re.compile(r"\w+=")  # a part between commas that belongs to the arm before it


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training of an arena: its name (the text that was given), objective, peak learning rate and rollout."""

    name: str
    objective: ObjectiveConfig
    learning_rate: float
    rollout: RolloutConfig

    @classmethod
    def parse(cls, text: str, common: DistillConfig) -> "Arm":
        """The arm that `NAME[:OPTION=VALUE,...][@SETTING=VALUE,...]` describes; `common` has the other settings.

        Examples: `jsd:beta=0.3@cross_entropy=0.5,lr=1e-4`, `reverse_kl@on_policy=0.5,rollout=distillm`.

        Raises: UsageError if an option or setting is unknown, or its value is not possible.
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
        train_config = replace(common.settings, learning_rate=learning_rate)  # checks the rate
        rollout = RolloutConfig(
            name=values.get("rollout", common.rollout), share=numbers.get("on_policy", common.on_policy)
        )
        check_rollout(rollout, objective_config, train_config, teacher=common.teachers[0].location, cache=None)
        return cls(name=text, objective=objective_config, learning_rate=learning_rate, rollout=rollout)

    def make_stage(
        self,
        common: DistillConfig,
        *,
        student: str | None,
        tokens: int | None,
        seed: int,
        epochs: float | None = None,
    ) -> DistillConfig:
        """The config of this arm's training: `common` with its settings, from `student` or pruned as `common` says."""
        settings = replace(common.settings, learning_rate=self.learning_rate, tokens=tokens, epochs=epochs, seed=seed)
        rollout, documents = self.rollout, min(common.documents, CARD_DOCUMENTS)
        stage = replace(common, objective=self.objective, settings=settings, documents=documents)
        stage = replace(stage, on_policy=rollout.share, rollout=rollout.name)
        return stage if student is None else replace(stage, student=student, keep=None, params=None)

    def is_equivalent(self, other: "Arm") -> bool:
        """Whether both arms train in the same way; their names may differ."""
        return replace(self, name="") == replace(other, name="")

    @property
    def folder_name(self) -> str:
        """The name with characters that are safe in file names."""
        return re.sub(r"[^\w.-]+", "-", self.name)


def split_arms(text: str) -> tuple[str, ...]:
    """Split `a,b:x=1,y=2,c` into `a`, `b:x=1,y=2` and `c`: a part like `y=2` belongs to the arm before it."""
    arms: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if arms and CONTINUATION.match(piece):
            arms[-1] += f",{piece}"
        elif piece:
            arms.append(piece)
    return tuple(arms)


def _parse_settings(text: str, arm: str) -> dict[str, str]:
    """The values of `lr=1e-4,rollout=gkd` by name."""
    settings: dict[str, str] = {}
    for assignment in filter(None, text.split(",")):
        name, _, value = assignment.partition("=")
        if name not in ARM_SETTINGS:
            raise UsageError(f"the arm {arm!r} has no setting {name!r}; after an @ use {', '.join(ARM_SETTINGS)}")
        if name in settings:
            raise UsageError(f"the arm {arm!r} sets {name} twice; set it once")
        settings[name] = value
    return settings


def _parse_number(name: str, value: str, arm: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UsageError(f"the arm {arm!r} sets {name} to {value!r}, which is not a number") from error
