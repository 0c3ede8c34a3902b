"""What an engine counts and times."""

from dataclasses import dataclass

from potstill.decode.speculative import DraftStats


@dataclass
class EngineStats(DraftStats):
    """Counts since the engine began: new tokens, passes of the model for them, and what a drafter contributed.

    `prompt_tokens` are those that were read, in `prompt_seconds`; the passes, with their drafts, took `seconds`.
    """

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
