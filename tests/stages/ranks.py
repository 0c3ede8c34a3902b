"""The command line on a rank that has some trouble of its own; started by test_ranks.py under torchrun."""

import os
import sys

import torch
from transformers import TrainerCallback

from potstill.cli.app import main
from potstill.core.errors import ArtifactError
from potstill.stages.prune import PruneConfig
from potstill.train import run


class Trouble(TrainerCallback):
    """What befalls a rank at its third step."""

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Fails, or dies."""
        if state.global_step == 2 and sys.argv[0] == "an error":
            raise ArtifactError("no room on rank 1")
        if state.global_step == 2 and sys.argv[0] == "death":
            os._exit(9)


def troubled() -> None:
    """Makes the pruned student of this rank another one, or lets its training fail."""
    original, interrupt = PruneConfig.apply, run.InterruptCallback

    def apply(self: PruneConfig, loaded: object) -> object:
        student, card = original(self, loaded)
        if sys.argv[0] == "another student":
            with torch.no_grad():
                next(student.parameters()).mul_(1.001)
        return student, card

    PruneConfig.apply = apply
    run.InterruptCallback = type("Interrupt", (Trouble, interrupt), {})


if __name__ == "__main__":
    sys.argv.pop(0)  # what is left: the trouble, then the verb and its options
    if os.environ["RANK"] == "1":
        troubled()
    main()
