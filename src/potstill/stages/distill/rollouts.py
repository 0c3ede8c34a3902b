"""Rollouts in a distillation: checks of their options, and the rollout of a run."""

from potstill.core.errors import UsageError, VocabularyMismatch
from potstill.data.packing import Packs
from potstill.decode.sampling import Sampling
from potstill.decode.stop_tokens import require_stop_tokens
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.model_pair import ModelPair
from potstill.teachers.http_client import is_address
from potstill.train import distributed
from potstill.train.config import TrainConfig
from potstill.train.rollouts.base import Rollout
from potstill.train.rollouts.config import DISTILLM, MINILLM, RolloutConfig

SAMPLING_TIME_NOTE = "the estimate does not include the time that the student takes to sample completions (--on-policy)"


def check_rollout(
    rollout_config: RolloutConfig,
    objective: ObjectiveConfig,
    settings: TrainConfig,
    *,
    teacher: str | None,
    cache: str | None,
) -> None:
    """Refuse a rollout that no signal or no evaluation can serve.

    Raises: UsageError.
    """
    if objective.required_rollout == MINILLM and not (rollout_config.name == MINILLM and rollout_config.share):
        raise UsageError("--objective minillm judges what --rollout minillm samples; give it, with --on-policy 0.5 say")
    if rollout_config.share == 1 and 0 < objective.cross_entropy < 1 and objective.uses_teacher:
        raise UsageError(
            "--on-policy 1 leaves no document of the data, so cross-entropy would train on nothing; give a share below "
            "1, or --cross-entropy 0"
        )
    if not rollout_config.is_enabled:
        if rollout_config.name == MINILLM:
            raise UsageError("--rollout minillm samples a share of the text; give it, such as --on-policy 0.5")
        return
    if not objective.uses_teacher:
        raise UsageError(
            "cross_entropy learns nothing from what the student itself writes; give an --objective with a teacher, or "
            "omit --on-policy"
        )
    if cache is not None:
        raise UsageError(
            "--teacher-cache holds what the teacher said of one text, and --on-policy writes another; learn from a "
            "teacher that is here or served"
        )
    if rollout_config.name == MINILLM and is_address(teacher):
        raise UsageError("--rollout minillm samples with the teacher, token by token; give one that is here")
    if rollout_config.name == DISTILLM and not settings.eval_every:
        raise UsageError("--rollout distillm grows its share by what evaluations say; give --eval-every")


def check_rollout_tokenizers(rollout_config: RolloutConfig, *, uses_teacher_tokens: bool) -> None:
    """Refuse a rollout in which the teacher samples too, but has another tokenizer.

    Raises: VocabularyMismatch.
    """
    if rollout_config.name == MINILLM and rollout_config.is_enabled and uses_teacher_tokens:
        raise VocabularyMismatch(
            "--rollout minillm samples from teacher and student together, whose tokenizers differ; choose --rollout gkd"
        )


def build_rollout(
    rollout_config: RolloutConfig, settings: TrainConfig, pair: ModelPair, packs: Packs
) -> Rollout | None:
    """The rollout of a run; None where every token comes from the data.

    Raises: VocabularyMismatch, as `check_rollout_tokenizers` does; UsageError where no token ends a text.
    """
    check_rollout_tokenizers(rollout_config, uses_teacher_tokens=pair.uses_teacher_tokens)
    if not rollout_config.is_enabled:
        return None
    extend_pack = pair.prepare_packs(packs).add_teacher_inputs if pair.uses_teacher_tokens else dict
    sampling = Sampling(vocabulary=pair.vocabulary, stop=require_stop_tokens(pair.student, pair.origin.tokenizer))
    return rollout_config.build(settings, sampling, world_size=distributed.world_size(), extend_pack=extend_pack)
