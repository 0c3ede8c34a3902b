"""What free slots still hold of their last texts, so that a prompt that begins alike is not read again.

A chat grows at its end: the prompt of each turn begins with the prompt and the answer of the turn before.
"""

from collections.abc import Sequence

from potstill.decode.runner import ModelRunner


class PrefixCache:
    """The ids of the last text in each free slot of `runner`, as far as the runner has read them."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.ids: dict[int, Sequence[int]] = {}

    def store(self, slot: int, ids: Sequence[int]) -> None:
        """The text `ids` has ended; the slot keeps what it has read of it."""
        self.ids[slot] = ids[: self.runner.get_length(slot)]

    def reuse(self, slot: int, prompt: Sequence[int]) -> int:
        """Keeps the tokens that begin `prompt` as well; returns how many. The last token of a prompt is always read."""
        pairs = zip(self.ids.pop(slot, ()), prompt[:-1], strict=False)
        num_shared = 0
        for past_id, new_id in pairs:
            if past_id != new_id:
                break
            num_shared += 1
        return self.runner.rewind(slot, num_shared)
