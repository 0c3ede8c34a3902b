"""The errors of potstill. Each message is one sentence that names the wrong value and says what to do.

`exit_code` is the exit status of the command line: 2 if the call is wrong, 1 if a correct call failed.
"""


class PotstillError(ValueError):
    """The base class of every error that potstill raises itself."""

    exit_code = 1


def get_first_line(error: BaseException) -> str:
    """The first line of a library's error, at most 200 characters; the rest is advice for other users.

    The name of its type where the error has no message.
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else f"{line[:200]}..."


class UsageError(PotstillError):
    """The call is wrong: an option out of range, or options that exclude each other."""

    exit_code = 2


class NotFound(UsageError):
    """A model, file, data set, recipe or stage that does not exist."""


class OutputExists(UsageError):
    """The output folder is not empty; `--overwrite` replaces it, `--resume` continues its run."""


class OutputInUse(PotstillError):
    """Another process writes this output; the message names that process."""


class InfeasibleTarget(UsageError):
    """No shape of this model has the requested size."""


class DataError(PotstillError):
    """A data set that cannot be read, is empty, or would train nothing (or everything) by mistake."""


class VocabularyMismatch(UsageError):
    """The objective needs one tokenizer, and teacher and student have two."""


class CacheMismatch(UsageError):
    """A teacher's cache was made with another teacher, text or option than those of this run."""


class ServerError(PotstillError):
    """A server cannot be reached, refuses a request, or gives an unusable answer."""


class UnsupportedModel(PotstillError):
    """Potstill cannot handle the architecture, weights or output layer of this model correctly."""


class UnsafeModel(UsageError):
    """The model has pickled weights or its own code, which potstill loads only with the option that allows them."""


class ArtifactError(PotstillError):
    """A checkpoint, card or stage on disk is corrupt, incomplete or from another run."""


class TrainingDiverged(PotstillError):
    """The loss exploded or became NaN or infinite; the message names the step and the batch."""


class RewardFailed(PotstillError):
    """A reward raises, hangs, or returns no finite number for each completion; the message names it."""


class TrainingStalled(PotstillError):
    """Nothing was learned for many steps, because no sample was better than another; the message says why."""


class PeerFailed(PotstillError):
    """Another rank of this job failed; the message has its reason, and `exit_code` is that rank's."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class MissingDependency(PotstillError):
    """An optional package is missing; the message has the command that installs it."""


class Interrupted(PotstillError):
    """The user stopped a run, which first saved a checkpoint for `--resume`."""

    exit_code = 130
