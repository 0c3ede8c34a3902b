"""The options of rollouts: the kind, and the share of documents with sampled completions."""

from collections.abc import Callable
from dataclasses import dataclass

from potstill.core.errors import UsageError
from potstill.core.suggestions import suggest
from potstill.data.packing import Pack
from potstill.decode.sampling import Sampling
from potstill.train.config import TrainConfig
from potstill.train.rollouts.base import Rollout
from potstill.train.rollouts.on_policy import CompletionSampler, OnPolicyRollout
from potstill.train.rollouts.replay import AdaptiveRollout

GKD, DISTILLM, MINILLM = "gkd", "distillm", "minillm"
ROLLOUTS = (GKD, DISTILLM, MINILLM)
TEACHER_SHARE = 0.2  # alpha in MiniLLM, section 3.1: the weight of the teacher in the sampled mixture


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """A `share` of the documents gets completions that are sampled in training. For `distillm` it is the first share.

    Raises: UsageError for an unknown rollout, or a share outside of 0 to 1.
    """

    name: str = GKD
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ROLLOUTS:
            raise UsageError(
                f"there is no rollout {self.name!r}{suggest(self.name, ROLLOUTS)}; choose one of {', '.join(ROLLOUTS)}"
            )
        if not 0 <= self.share <= 1:
            raise UsageError(f"--on-policy is {self.share}; it must be a share of the documents, from 0 to 1")

    @property
    def is_enabled(self) -> bool:
        """Whether any completion is sampled."""
        return self.share > 0 or self.name == DISTILLM

    def build(
        self,
        config: TrainConfig,
        sampling: Sampling,
        *,
        world_size: int = 1,
        extend_pack: Callable[[Pack], Pack] = dict,
    ) -> Rollout:
        """The rollout for a training run; see `CompletionSampler` for `extend_pack`."""
        teacher_share = TEACHER_SHARE if self.name == MINILLM else 0.0
        sampler = CompletionSampler(
            sampling=sampling, max_length=config.context, teacher_share=teacher_share, extend_pack=extend_pack
        )
        if self.name == DISTILLM:
            return AdaptiveRollout(
                sampler, total_passes=config.steps * config.accumulation_steps(world_size), share=self.share
            )
        return OnPolicyRollout(share=self.share, sampler=sampler)
