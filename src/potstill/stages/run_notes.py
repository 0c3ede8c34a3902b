"""What a user should know of a run beyond its measures: repeated data, a short budget, and a student that got worse."""

from collections.abc import Mapping, Sequence

from potstill.core.card import BEFORE_TRAINING
from potstill.core.measure import Measure
from potstill.stages.console import print_note, print_warning
from potstill.train.config import TrainConfig

MAX_PASSES = 2.0  # over the same text without a note
MIN_SHARE = 0.9  # of the tokens asked for, without a note


def report_passes(settings: TrainConfig, available: int) -> None:
    """Note how often training passes over the `available` tokens of the text, if more than twice."""
    tokens = settings.count_tokens(available)
    if tokens > MAX_PASSES * available:
        option = "--tokens" if settings.epochs is None else "--epochs"
        print_note(
            f"{tokens:,} tokens pass {tokens / available:.1f} times over the {available:,} tokens of the text; more "
            f"text, or fewer {option}, lowers the risk of memorizing it"
        )


def report_outcome(tokens: int, trained: int, measures: Mapping[str, Sequence[Measure]], *, student: str) -> None:
    """Note a run of fewer tokens than asked for, and warn of a student that ended further from the teacher."""
    if trained < MIN_SHARE * tokens:
        print_note(
            f"{trained:,} of the {tokens:,} tokens that were asked for are trained; a run ends early with --patience, "
            f"and packs that are not full count only their tokens"
        )
    before, after = (_get_kl(measures.get(name, ())) for name in (BEFORE_TRAINING, student))
    if before is not None and after is not None and after > before:
        print_warning(
            f"the student ends further from the teacher (KL {after:.3f} nats) than it began ({before:.3f}); try a "
            f"smaller --lr, more --tokens, or text that is closer to what is measured"
        )


def _get_kl(measures: Sequence[Measure]) -> float | None:
    return next((measure.value for measure in measures if measure.name == "teacher_kl"), None)
