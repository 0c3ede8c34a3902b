"""What can go wrong for a caller: each error is one sentence that names the offending value and says what to do.

`exit_code` is what the command line returns: 2 where the call itself is wrong, 1 where it was right and failed.
"""


class PotstillError(ValueError):
    """The base of every error that potstill raises on purpose."""

    exit_code = 1


class UsageError(PotstillError):
    """The call is wrong: an option out of range, a combination that means nothing."""

    exit_code = 2


class NotFound(UsageError):
    """A model, file, data set, recipe or stage that is not there."""


class OutputExists(UsageError):
    """The output folder holds something already; `--overwrite` replaces it, `--resume` continues it."""


class InfeasibleTarget(UsageError):
    """No shape of this model reaches the size that was asked for."""


class DataError(PotstillError):
    """A data set that cannot be read, is empty, or would train nothing (or everything) by mistake."""


class VocabularyMismatch(UsageError):
    """Teacher and student do not read text as the same tokens, which this objective needs."""


class CacheMismatch(UsageError):
    """A teacher's cache that was made from another teacher, text or setting than it is used for."""


class ServerError(PotstillError):
    """A server that cannot be reached, refuses what it is asked, or answers what cannot be used."""


class UnsupportedModel(PotstillError):
    """A model whose architecture, weights or head potstill cannot treat correctly."""


class UnsafeModel(UsageError):
    """Weights that are pickled, or code that comes with a model; both run only when asked for."""


class ArtifactError(PotstillError):
    """A checkpoint, card or stage on disk that is corrupt, half-written or somebody else's."""


class TrainingDiverged(PotstillError):
    """The loss became NaN, infinite or exploded; the message names the step and the batch."""


class PeerFailed(PotstillError):
    """Another rank of the same job failed, and says why; `exit_code` is what this one's own failure had given."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class MissingDependency(PotstillError):
    """An optional package is needed; the message holds the command that installs it."""


class Interrupted(PotstillError):
    """A run that was asked to stop and did, after saving what `--resume` continues from."""

    exit_code = 130
