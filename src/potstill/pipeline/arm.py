"""An arm of an arena: what one contestant does otherwise than the others, as a value and as a line of text."""

import re
from dataclasses import dataclass, replace

from potstill.core.errors import UsageError
from potstill.objectives.named import Mixture
from potstill.pipeline.distill import Distill
from potstill.pipeline.rollouts import require_answers
from potstill.train.policy import Policy

NUMBERS = ("cross_entropy", "temperature", "lr", "on_policy")
SETTINGS = (*NUMBERS, "rollout")  # what an arm may set for itself, after an @
OF_ITS_OWN = 8  # documents that an arm's own card is measured on; all arms are measured together, on all documents
GOES_ON = re.compile(r"\w+=")  # a piece between commas that belongs to the arm before it


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A contestant: its name, which is what was asked for, its objective, its peak rate, and who writes its text."""

    name: str
    objective: Mixture
    learning_rate: float
    policy: Policy

    @classmethod
    def parse(cls, text: str, common: Distill) -> "Arm":
        """`NAME[:OPTION=VALUE,...][@SETTING=VALUE,...]`, where `common` says what the text leaves open.

        `jsd:beta=0.3@cross_entropy=0.5,lr=1e-4` is one, `reverse_kl@on_policy=0.5,rollout=distillm` another.

        Raises: UsageError.
        """
        objective, _, settings = text.partition("@")
        chosen = _chosen(settings, text)
        given = {name: _number(name, chosen[name], text) for name in NUMBERS if name in chosen}
        mixture = Mixture.parse(
            objective,
            cross_entropy=given.get("cross_entropy", common.objective.cross_entropy),
            temperature=given.get("temperature", common.objective.temperature),
        )
        rate = given.get("lr", common.settings.learning_rate)
        learned = replace(common.settings, learning_rate=rate)  # refuses one that is none
        policy = Policy(name=chosen.get("rollout", common.rollout), share=given.get("on_policy", common.on_policy))
        require_answers(policy, mixture, learned, teacher=common.sole, cache=None)
        return cls(name=text, objective=mixture, learning_rate=rate, policy=policy)

    def stage(self, common: Distill, *, student: str | None, tokens: int, seed: int) -> Distill:
        """The training of this arm: `common` with its objective and rate, from `student` (or cut, as `common` says)."""
        settings = replace(common.settings, learning_rate=self.learning_rate, tokens=tokens, seed=seed)
        policy, documents = self.policy, min(common.documents, OF_ITS_OWN)
        own = replace(common, objective=self.objective, settings=settings, documents=documents)
        own = replace(own, on_policy=policy.share, rollout=policy.name)
        return own if student is None else replace(own, student=student, keep=None, params=None)

    def same(self, other: "Arm") -> bool:
        """Whether both train alike, whatever they are called."""
        return replace(self, name="") == replace(other, name="")

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


def _chosen(text: str, arm: str) -> dict[str, str]:
    """`lr=1e-4,rollout=gkd` as values by name."""
    found: dict[str, str] = {}
    for piece in filter(None, text.split(",")):
        name, _, value = piece.partition("=")
        if name not in SETTINGS:
            raise UsageError(f"the arm {arm!r} has no setting {name!r}; after an @ it takes {', '.join(SETTINGS)}")
        if name in found:
            raise UsageError(f"the arm {arm!r} sets {name} twice; set it once")
        found[name] = value
    return found


def _number(name: str, value: str, arm: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UsageError(f"the arm {arm!r} sets {name} to {value!r}, which is no number") from error
