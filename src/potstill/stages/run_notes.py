"""What a user should know of a run beyond its measures: repeated data, a short budget, and a student that got worse."""

from collections.abc import Mapping, Sequence

from potstill.core.card import BEFORE_TRAINING
from potstill.core.measure import Measure
from potstill.stages.console import print_note, print_warning
from potstill.train.config import TrainConfig

MAX_PASSES = 2.0  # over the same text without a note
MIN_SHARE = 0.9  # of the tokens asked for, without a note
PREFERENCE_BASELINES = {"shorter_accuracy": "shorter", "likelihood_accuracy": "likelier"}


def report_passes(settings: TrainConfig, available: int) -> None:
    """Note how often training passes over the `available` tokens of the text, if more than twice."""
    tokens = settings.count_tokens(available)
    if tokens > MAX_PASSES * available:
        option = "--tokens" if settings.epochs is None else "--epochs"
        print_note(
            f"{tokens:,} tokens pass {tokens / available:.1f} times over the {available:,} tokens of the text; more "
            f"text, or fewer {option}, lowers the risk of memorizing it"
        )


def report_outcome(
    tokens: int, trained: int, measures: Mapping[str, Sequence[Measure]], *, student: str, prefers_chosen: bool = True
) -> None:
    """Note a run of fewer tokens than asked for, and warn of a student that ended further from the teacher.

    Of an alignment it notes the accuracy beside two baselines. Where the run `prefers_chosen` answers, it also notes
    that they are less likely than before.
    """
    if trained < MIN_SHARE * tokens:
        print_note(
            f"the run trained {trained:,} tokens in place of {tokens:,}: --patience ended it, or its packs or "
            f"last steps are not full"
        )
    models = (BEFORE_TRAINING, student)
    before, after = (_get_value(measures.get(name, ()), "teacher_kl") for name in models)
    if before is not None and after is not None and after > before:
        print_warning(
            f"the student ends further from the teacher (KL {after:.3f} nats) than it began ({before:.3f}); try a "
            f"smaller --lr, more --tokens, or text that is closer to what is measured"
        )
    chosen_before, chosen_after = (_get_value(measures.get(name, ()), "chosen_log_p") for name in models)
    if prefers_chosen and chosen_before is not None and chosen_after is not None and chosen_after < chosen_before:
        print_note(
            f"chosen answers are less likely than before ({chosen_before:.1f} to {chosen_after:.1f} nats an answer); a "
            f"loss of differences allows it, and a smaller --lr, or a weight of their own loss (dpo:nll=0.2), limits it"
        )
    accuracy = _get_value(measures.get(student, ()), "reward_accuracy")
    baselines = {name: _get_value(measures.get(BEFORE_TRAINING, ()), name) for name in PREFERENCE_BASELINES}
    if accuracy is not None and None not in baselines.values():
        shares = " and ".join(
            f"the {PREFERENCE_BASELINES[name]} one in {share:.3f}" for name, share in baselines.items()
        )
        print_note(
            f"the implied reward prefers the chosen answer in {accuracy:.3f} of the held-out pairs; without training, "
            f"the chosen answer is {shares}"
        )


def _get_value(measures: Sequence[Measure], name: str) -> float | None:
    return next((measure.value for measure in measures if measure.name == name), None)
