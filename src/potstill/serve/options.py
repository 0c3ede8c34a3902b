"""The options of `potstill serve`."""

from dataclasses import dataclass

from potstill.core.errors import UsageError
from potstill.core.options import (
    ALLOW_PICKLE,
    DEVICE,
    DTYPE,
    IGNORE_GENERATION_CONFIG,
    TRUST_REMOTE_CODE,
    Option,
)
from potstill.decode.drafters.options import NO_DRAFT, DraftOptions

API_KEY_VARIABLE = "POTSTILL_API_KEY"
MAX_CONTEXT = 4096  # tokens; of a model with a longer context, unless --context asks for more


@dataclass(frozen=True, kw_only=True)
class ServeLimits:
    """What the server takes on at once, and from one request.

    Raises: UsageError for a value out of range.
    """

    slots: int = Option(16, "Answers that are generated at once.").field()
    max_queue: int = Option(
        64, "Answers that may wait for a slot; a request beyond that gets status 429 with Retry-After."
    ).field()
    context: int | None = Option[int | None](
        None, f"Most tokens of a prompt with its answer; default: the model's context, at most {MAX_CONTEXT}."
    ).field()
    max_logprobs: int = Option(
        20, "Most log-probabilities of a token that a request may ask for; -1: no limit."
    ).field()
    max_body: int = Option(4_000_000, "Most bytes of a request's body, such as 4M.", is_count=True).field()
    timeout: float = Option(600.0, "Seconds until an answer must be complete; later the client gets an error.").field()

    def __post_init__(self) -> None:
        lowest = {"slots": 1, "max_queue": 0, "context": 2, "max_logprobs": -1, "max_body": 1}
        for name, minimum in lowest.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                note = ", or -1 for no limit" if minimum < 0 else ""
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least {max(minimum, 0)}{note}")
        if not self.timeout > 0:
            raise UsageError(f"--timeout is {self.timeout:g}; it must be above 0 seconds")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where the server listens, whom it answers, and how the model is opened."""

    host: str = Option("127.0.0.1", "The address to listen on; 0.0.0.0: all, and then set an API key.").field()
    port: int = Option(8000, "The port; 0: any free port.").field()
    allowed_host: tuple[str, ...] = Option[tuple[str, ...]](
        (), "A further host name by which clients reach this server; repeat for several."
    ).field()
    size: str | None = Option[str | None](
        None, "auto: an elastic model answers with a smaller size while many requests are there."
    ).field()
    token_seconds: float | None = Option[float | None](
        None,
        "Seconds between two tokens of an answer that --size auto keeps to; default: those of the largest size with a "
        "quarter of the slots in use.",
    ).field()
    limits: ServeLimits = ServeLimits()
    drafts: DraftOptions = NO_DRAFT
    ignore_generation_config: bool = IGNORE_GENERATION_CONFIG.field()
    device: str = DEVICE.field()
    dtype: str = DTYPE.field()
    allow_pickle: bool = ALLOW_PICKLE.field()
    trust_remote_code: bool = TRUST_REMOTE_CODE.field()

    def __post_init__(self) -> None:
        """Refuse options of sizes that mean nothing, or exclude others."""
        if self.size not in (None, "auto"):
            raise UsageError(f"--size takes auto, not {self.size!r}; one size is a model of its own, such as MODEL#0.5")
        if self.token_seconds is not None and (self.size is None or self.token_seconds <= 0):
            raise UsageError(f"--token-seconds {self.token_seconds:g} must be above 0, and needs --size auto")
        if self.size is not None and self.drafts.draft is not None:
            raise UsageError("--size auto decodes without drafts; omit --draft, or serve one size, such as MODEL#0.5")
