"""Rehearses the end of a training run before its first step: saving, opening again, the card and its samples."""

import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from potstill.core.errors import ArtifactError
from potstill.core.screen import status
from potstill.models.load import LoadedModel
from potstill.stages.console import print_note
from potstill.stages.model_card import write_card
from potstill.stages.publication import make_card
from potstill.stages.saved_model import save_model
from potstill.stages.training_run import TrainingRun
from potstill.train import distributed
from potstill.train.run import TrainResult

MAX_REASON = 200  # characters of a library's error


@status("checking that the result can be saved")
def rehearse(run: TrainingRun, *, title: str) -> None:
    """Save all but the weights to a temporary folder, open it again, and write a card there.

    Samples that cannot be prepared are noted, since the student does without.

    Raises: ArtifactError for a student that could not be saved and opened at the end.
    """
    if not distributed.is_main_process():
        return
    with tempfile.TemporaryDirectory() as name:
        rehearse_saving(run.student, run.origin, Path(name), trust_remote_code=run.config.trust_remote_code)
        write_card(Path(name), make_card(run, make_empty_result(run), []), title=title)
    try:
        run.check_samples()
    except Exception as error:  # whatever a user's template raises
        print_note(f"the card will hold no samples: {summarize_error(error)}")


def rehearse_saving(model: PreTrainedModel, origin: LoadedModel, folder: Path, *, trust_remote_code: bool) -> None:
    """Save the model with its smallest weight alone, and the tokenizer, and open config and tokenizer from there.

    Raises: ArtifactError.
    """
    smallest_weight = dict([min(model.state_dict().items(), key=lambda item: item[1].numel())])
    try:
        save_model(model, origin, folder, state_dict=smallest_weight)
        AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # each library has its own
        raise ArtifactError(
            f"the student could not be saved and opened again at the end ({summarize_error(error)}); correct the "
            f"config or the tokenizer of {origin.name}"
        ) from error


def make_empty_result(run: TrainingRun) -> TrainResult:
    """The result of a run that has not begun."""
    losses = dict.fromkeys(run.module.term_names, 0.0)
    return TrainResult(
        finished=False, steps=0, tokens=0, seconds=0.0, tokens_per_second=0.0, peak_memory=0, losses=losses
    )


def summarize_error(error: Exception) -> str:
    """The type and the first line of an error, in at most `MAX_REASON` characters."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:MAX_REASON]}"
