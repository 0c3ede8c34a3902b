"""Rollouts in a distillation: what can answer for text that is written in training, and where that text ends."""

from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import UsageError, VocabularyMismatch
from potstill.data.packing import Pack
from potstill.decode.sampling import Sampling
from potstill.decode.stop_tokens import require_stop_tokens
from potstill.objectives.config import ObjectiveConfig
from potstill.teachers.http_client import is_address
from potstill.train import distributed
from potstill.train.config import TrainConfig
from potstill.train.rollouts.base import Rollout
from potstill.train.rollouts.config import DISTILLM, MINILLM, RolloutConfig

SAMPLING_TIME_NOTE = (
    "what the student writes itself (--on-policy) is in no forecast: the time of its sampling comes on top"
)


def check_rollout(
    rollout_config: RolloutConfig,
    objective: ObjectiveConfig,
    settings: TrainConfig,
    *,
    teacher: str | None,
    cache: str | None,
) -> None:
    """Refuse rollouts that nobody could answer for.

    Raises: UsageError.
    """
    if objective.name == MINILLM and not (rollout_config.name == MINILLM and rollout_config.share):
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


def build_rollout(
    rollout_config: RolloutConfig,
    settings: TrainConfig,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary: int,
    add_teacher_tokens: Callable[[Pack], Pack] = dict,
) -> Rollout | None:
    """The rollout of a run; None where the text is the data's alone. For `beside` see `train.rollout.Author`.

    Raises: VocabularyMismatch for a teacher with tokens of its own that is to write along.
    """
    if not rollout_config.is_enabled:
        return None
    if rollout_config.name == MINILLM and add_teacher_tokens is not dict:
        raise VocabularyMismatch(
            "--rollout minillm samples from teacher and student together, whose tokenizers differ; choose --rollout gkd"
        )
    sampling = Sampling(vocabulary=vocabulary, stop=require_stop_tokens(student, tokenizer))
    return rollout_config.build(settings, sampling, world_size=distributed.world_size(), extend_pack=add_teacher_tokens)
