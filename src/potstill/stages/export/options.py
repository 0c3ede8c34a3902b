"""The options of `export`. Nothing here imports torch."""

from dataclasses import dataclass

from potstill.core.options import ALLOW_PICKLE, TRUST_REMOTE_CODE, Option
from potstill.stages.options import SAVE_DTYPE


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of `export`."""

    model: str
    to: str
    type: str = Option(
        "f16", "Data type of the matrices in a GGUF file: f32, f16, bf16, q8_0 or q4_0 (8 or 4 bits a weight)."
    ).field()
    draft: str | None = Option[str | None](
        None, "A smaller model with the same tokenizer, whose tokens the model only verifies; exported with it."
    ).field()
    size: float | None = Option[float | None](
        None, "The size of an elastic model to export, such as 0.5; the same as MODEL#0.5."
    ).field()
    check: bool = Option(True, "Compare 100 greedy tokens with the runtime, where it is installed.").field()
    save_dtype: str = SAVE_DTYPE.field()
    allow_pickle: bool = ALLOW_PICKLE.field()
    trust_remote_code: bool = TRUST_REMOTE_CODE.field()
