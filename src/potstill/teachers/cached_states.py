"""Full distributions from a cache: its last hidden states through the teacher's own head."""

from dataclasses import dataclass

from potstill.core.types import Batch, Head, Needs, Signals, select_supervised_rows
from potstill.ops.layout import apply_padded
from potstill.teachers.cached import TeacherCache, check_needs_only_rows


@dataclass(frozen=True)
class CachedHiddenStates:
    """A source of full distributions: the last hidden states from a cache, and the teacher's loaded `head`."""

    cache: TeacherCache
    head: Head

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        """The hidden states at the rows of a packed batch, in the head's dtype, and the head that computes logits.

        Raises: what `TeacherCache.hidden_states` raises.
        """
        check_needs_only_rows(needs)
        head = self.head if vocabulary is None else self.head.crop_vocabulary(vocabulary)
        states = self.cache.hidden_states(batch).to(head.weight.dtype)
        signals = Signals(rows=states, logits=lambda rows: apply_padded(head.logits, rows), head=head)
        return select_supervised_rows(signals, batch, needs)
