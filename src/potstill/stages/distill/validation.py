"""Checks of the options of a distillation; each refuses a wrong one before anything is read."""

from collections.abc import Sequence

from potstill.core.errors import UsageError
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.distill.ensemble import TeacherSource
from potstill.stages.distill.rollouts import check_rollout
from potstill.stages.option_checks import check_choice
from potstill.stages.preflight import check_package
from potstill.teachers.external import check_server_supports, check_teacher_source
from potstill.teachers.served import TOP_K
from potstill.train.config import TrainConfig
from potstill.train.rollouts.config import MINILLM, RolloutConfig
from potstill.train.selection import compile_pattern

TRACKERS = ("tensorboard", "wandb", "trackio")


def check_text_objective(objective: ObjectiveConfig) -> None:
    """Refuse an objective that trains on preferences, labels or prompts.

    Raises: UsageError.
    """
    if objective.data != "text":
        raise UsageError(f"{objective.name} trains on {objective.data}; use potstill align")


def check_teacher(
    source: TeacherSource,
    objective: ObjectiveConfig,
    rollout: RolloutConfig,
    settings: TrainConfig,
    *,
    student: str | None,
) -> None:
    """Refuse a teacher that cannot give the signals that the objective or the rollout needs.

    Raises: UsageError.
    """
    check_teacher_source(source.location, source.cache, student=student)
    if source.kind == "served":
        check_server_supports(objective, top_k=source.top_k)
    if objective.needs_teacher_model and source.cache is not None and not objective.needs_only_last_hidden:
        raise UsageError(f"{objective.name} needs more of a teacher than a cache keeps; remove --teacher-cache")
    if objective.needs_teacher_model and source.kind != "local":
        raise UsageError(f"{objective.name} reads a teacher's weights; give a --teacher whose weights are here")
    check_rollout(rollout, objective, settings, teacher=source.location, cache=source.cache)


def check_ensemble(objective: ObjectiveConfig, rollout: RolloutConfig, *, cache: str | None) -> None:
    """Refuse an objective, a rollout or a cache that several teachers cannot share.

    Raises: UsageError.
    """
    if objective.needs_teacher_model:
        raise UsageError(
            f"{objective.name} learns from the hidden states or the tables of one teacher; with several, choose a "
            f"divergence, such as --objective forward_kl"
        )
    if not objective.uses_teacher:
        raise UsageError("cross_entropy uses no teacher's signals, and one teacher measures; give --teacher once")
    if cache is not None:
        raise UsageError("with several teachers a cache is one of them; give --teacher CACHE, not --teacher-cache")
    if rollout.is_enabled and rollout.name == MINILLM:
        raise UsageError("--rollout minillm samples with one teacher; give one, or --rollout gkd")


def check_top_k(top_k: int, sources: Sequence[TeacherSource]) -> None:
    """Refuse `--top-k` where no teacher is a server.

    Raises: UsageError.
    """
    if top_k != TOP_K and all(source.kind != "served" for source in sources):
        raise UsageError(
            "--top-k applies to a served teacher, and no teacher here is served; remove it (a cache has the tokens "
            "that `potstill cache` kept)"
        )


def check_lora_rank(rank: int) -> None:
    """Refuse a negative rank.

    Raises: UsageError.
    """
    if rank < 0:
        raise UsageError(f"--lora is {rank}; it is a rank, and 0 trains all weights")


def check_trained_names(pattern: str | None, *, lora: int) -> None:
    """Refuse a pattern of parameter names that is no regular expression, or that adapters would overrule.

    Raises: UsageError.
    """
    if pattern is None:
        return
    if lora:
        raise UsageError("--lora trains adapters, and --train names other weights to train; omit one of them")
    compile_pattern(pattern)


def check_sizes(sizes_per_step: int | None, sizes_from: str) -> None:
    """Refuse a step without the largest and the smallest size, and an unknown teacher of the smaller ones.

    Raises: UsageError.
    """
    if sizes_per_step is not None and sizes_per_step < 2:
        raise UsageError(
            f"--sizes-per-step is {sizes_per_step}; a step trains at least 2, the largest and the smallest"
        )
    check_choice("sizes-from", sizes_from, ("teacher", "largest"))


def check_documents(documents: int) -> None:
    """Refuse to measure on no document.

    Raises: UsageError.
    """
    if documents < 1:
        raise UsageError(f"documents is {documents}; measuring needs at least one")


def check_draft_vocabulary(size: int | None) -> None:
    """Refuse a draft without a token.

    Raises: UsageError.
    """
    if size is not None and size < 1:
        raise UsageError(f"draft_vocabulary is {size}; give the number of tokens that the draft scores, such as 16384")


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not one of `TRACKERS`, or is not installed.

    Raises: UsageError, MissingDependency.
    """
    check_choice("report-to", name, TRACKERS)
    check_package(name)
