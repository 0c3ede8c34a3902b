"""Rollouts in a distillation: what can answer for text that is written in training, and where that text ends."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import UsageError, VocabularyMismatch
from potstill.data.pack import Pack
from potstill.data.wire import is_address
from potstill.decode.sample import Sampling
from potstill.objectives.named import Mixture
from potstill.train import ranks
from potstill.train.policy import DISTILLM, MINILLM, Policy
from potstill.train.rollout import Rollout
from potstill.train.settings import Settings

UNCOUNTED = "what the student writes itself (--on-policy) is in no forecast: the time of its sampling comes on top"


def require_answers(
    policy: Policy, objective: Mixture, settings: Settings, *, teacher: str | None, cache: str | None
) -> None:
    """Refuse rollouts that nobody could answer for.

    Raises: UsageError.
    """
    if objective.name == MINILLM and not (policy.name == MINILLM and policy.share):
        raise UsageError("--objective minillm judges what --rollout minillm samples; give it, with --on-policy 0.5 say")
    if policy.share == 1 and 0 < objective.cross_entropy < 1 and objective.teaches:
        raise UsageError(
            "--on-policy 1 leaves no document of the data, so cross-entropy would train on nothing; give a share below "
            "1, or --cross-entropy 0"
        )
    if not policy.writes:
        if policy.name == MINILLM:
            raise UsageError("--rollout minillm samples a share of the text; give it, such as --on-policy 0.5")
        return
    if not objective.teaches:
        raise UsageError(
            "cross_entropy learns nothing from what the student itself writes; give an --objective with a teacher, or "
            "omit --on-policy"
        )
    if cache is not None:
        raise UsageError(
            "--teacher-cache holds what the teacher said of one text, and --on-policy writes another; learn from a "
            "teacher that is here or served"
        )
    if policy.name == MINILLM and is_address(teacher):
        raise UsageError("--rollout minillm samples with the teacher, token by token; give one that is here")
    if policy.name == DISTILLM and not settings.eval_every:
        raise UsageError("--rollout distillm grows its share by what evaluations say; give --eval-every")


def rollout_of(
    policy: Policy,
    settings: Settings,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary: int,
    beside: Callable[[Pack], Pack] = dict,
) -> Rollout | None:
    """The rollout of a run; None where the text is the data's alone. For `beside` see `train.rollout.Author`.

    Raises: VocabularyMismatch for a teacher with tokens of its own that is to write along.
    """
    if not policy.writes:
        return None
    if policy.name == MINILLM and beside is not dict:
        raise VocabularyMismatch(
            "--rollout minillm samples from teacher and student together, whose tokenizers differ; choose --rollout gkd"
        )
    sampling = Sampling(vocabulary=vocabulary, stop=stops_of(student, tokenizer))
    return policy.build(settings, sampling, ranks=ranks.count(), beside=beside)


def stops_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end what a model writes: those of its generation config, and the tokenizer's end of text.

    Raises: UsageError where there is none, since no text would ever end.
    """
    stated = model.generation_config.eos_token_id
    several = stated if isinstance(stated, Sequence) else [stated]
    found = frozenset(int(one) for one in (*several, tokenizer.eos_token_id) if one is not None)
    if not found:
        raise UsageError(
            "neither model nor tokenizer names a token that ends a text, so --on-policy has no use; add one"
        )
    return found
