"""Who writes the tokens, as a value: which rollout, and how much of the text is the student's own."""

from collections.abc import Callable
from dataclasses import dataclass

from potstill.core.errors import UsageError
from potstill.data.packing import Pack
from potstill.decode.sampling import Sampling
from potstill.train.config import TrainConfig
from potstill.train.rollouts.base import Rollout
from potstill.train.rollouts.on_policy import CompletionSampler, OnPolicyRollout
from potstill.train.rollouts.replay import AdaptiveRollout

GKD, DISTILLM, MINILLM = "gkd", "distillm", "minillm"
ROLLOUTS = (GKD, DISTILLM, MINILLM)
TEACHER_SHARE = 0.2  # alpha of MiniLLM, section 3.1: the share of the teacher in what is sampled from


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """`share` of the documents get completions that are sampled in training; of `distillm` it is the share to begin by.

    Raises: UsageError for a rollout that there is none of, or a share that is none.
    """

    name: str = GKD
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ROLLOUTS:
            raise UsageError(f"no rollout is called {self.name!r}; choose one of {', '.join(ROLLOUTS)}")
        if not 0 <= self.share <= 1:
            raise UsageError(f"--on-policy is {self.share}; it is a share of the documents, from 0 to 1")

    @property
    def is_enabled(self) -> bool:
        """Whether anything is ever sampled."""
        return self.share > 0 or self.name == DISTILLM

    def build(
        self,
        config: TrainConfig,
        sampling: Sampling,
        *,
        world_size: int = 1,
        extend_pack: Callable[[Pack], Pack] = dict,
    ) -> Rollout:
        """The rollout for a run of these settings; for `beside` see `Author`."""
        teacher_share = TEACHER_SHARE if self.name == MINILLM else 0.0
        sampler = CompletionSampler(
            sampling=sampling, max_length=config.context, teacher_share=teacher_share, extend_pack=extend_pack
        )
        if self.name == DISTILLM:
            return AdaptiveRollout(
                sampler, total_passes=config.steps * config.accumulation_steps(world_size), share=self.share
            )
        return OnPolicyRollout(share=self.share, sampler=sampler)
