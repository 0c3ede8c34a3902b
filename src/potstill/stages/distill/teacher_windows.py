"""Leave out the windows of the text that a teacher with another tokenizer cannot read."""

from dataclasses import replace

from potstill.core.errors import UsageError
from potstill.data.cross_tokenizer.long_windows import count_teacher_tokens, keep_documents
from potstill.data.packing import Packs
from potstill.models.inference import get_max_context
from potstill.models.load import LoadedModel
from potstill.stages.console import print_note
from potstill.stages.dataset import PreparedDataset
from potstill.stages.model_pair import ModelPair
from potstill.train.run import compute_run_id

TOO_LONG = "more tokens than the teacher reads"


def leave_out_long_windows(pair: ModelPair, dataset: PreparedDataset) -> PreparedDataset:
    """The data set without windows whose text has more tokens than the teacher has positions; they are noted.

    With one tokenizer nothing changes, since `--context` is within every model's positions.

    Raises: UsageError if no window is left.
    """
    if not pair.uses_teacher_tokens:
        return dataset
    packs, num_dropped = _leave_out(pair, dataset.packs, "windows")
    validation_packs, num_held_out_dropped = _leave_out(pair, dataset.validation_packs, "held-out windows")
    if not num_dropped + num_held_out_dropped:
        return dataset
    facts = {
        **dataset.facts,
        "documents": len(packs.lengths),
        "tokens": packs.num_tokens,
        "dropped": {**dataset.facts.get("dropped", {}), TOO_LONG: num_dropped},
    }
    digest = compute_run_id(dataset.digest, packs.digest, validation_packs.digest)
    return replace(dataset, packs=packs, validation_packs=validation_packs, facts=facts, digest=digest)


def _leave_out(pair: ModelPair, packs: Packs, label: str) -> tuple[Packs, int]:
    """The packs without long windows, and how many those are."""
    assert isinstance(pair.teacher, LoadedModel)
    max_length = get_max_context(pair.teacher.model)
    counts = count_teacher_tokens(packs, *pair.readers, max_length=max_length)
    is_kept, longest = counts <= max_length, int(counts.max())
    if is_kept.all():
        return packs, 0
    context = max(2, packs.length * max_length // longest)
    if not is_kept.any():
        raise UsageError(
            f"each of the {len(counts):,} {label} has more tokens of the teacher than the {max_length:,} it reads, "
            f"up to {longest:,}; give a smaller --context, such as {context}"
        )
    kept_packs = keep_documents(packs, is_kept)
    num_dropped = len(packs.lengths) - len(kept_packs.lengths)
    print_note(
        f"{num_dropped:,} of {len(counts):,} {label} are left out: they have up to {longest:,} tokens of the teacher, "
        f"which reads {max_length:,}; --context {context} would keep about all"
    )
    return kept_packs, num_dropped
