"""An elastic student: what its training needs, and the objective over its sizes."""

from collections.abc import Sequence

from potstill.core.elastic import Size
from potstill.core.errors import UsageError
from potstill.core.types import Objective
from potstill.objectives.elastic import SIZES_PER_STEP, ElasticObjective
from potstill.stages.distill.config import DistillConfig


def check_elastic(config: DistillConfig, sizes: Sequence[Size]) -> None:
    """Refuse what the sizes of a student cannot be trained with, and options of sizes for a student without any.

    Raises: UsageError.
    """
    if not sizes:
        if config.sizes_from != DistillConfig.sizes_from or config.sizes_per_step is not None:
            raise UsageError(
                "--sizes-from and --sizes-per-step are for an elastic student; potstill convert --to elastic makes one"
            )
        return
    if config.lora or config.settings.shard:
        option = "--lora" if config.lora else "--shard"
        raise UsageError(f"{option} does not train the sizes of an elastic student; omit it, or train one, MODEL#0.5")
    if config.objective.needs_teacher_model or config.objective.required_rollout:
        raise UsageError(
            f"{config.objective.name} does not train the sizes of an elastic student; choose a divergence, such as "
            f"--objective forward_kl, or train one size, MODEL#0.5"
        )


def build_elastic_objective(config: DistillConfig, objective: Objective, sizes: Sequence[Size]) -> Objective:
    """The objective over the sizes of the student; `objective` itself for a student without any."""
    if not sizes:
        return objective
    return ElasticObjective(
        objective,
        [size.share for size in sizes],
        sizes_per_step=config.sizes_per_step or SIZES_PER_STEP,
        from_largest=config.sizes_from == "largest",
        seed=config.settings.seed,
    )
