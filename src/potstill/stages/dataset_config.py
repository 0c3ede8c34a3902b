"""Which text a stage reads, and in which windows."""

from dataclasses import dataclass
from typing import Any

from potstill.data.long_documents import ALL_DOCUMENTS, LongDocuments
from potstill.data.row_reader import DocumentLabel
from potstill.stages.options import TextOptions
from potstill.stages.text_options import get_text_options


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(TextOptions):
    """A data set in windows of `context` tokens. Without `eval_data` its own validation split is held out.

    `columns` maps our names to the columns of the data: `prompt=instruction,response=text`. With a `label` each
    document carries the number of its teacher or of its language. `long_documents` says which documents training sees.
    """

    data: str | tuple[str, ...]
    eval_data: str | None = None
    columns: str = ""
    context: int = 512
    seed: int = 1
    label: DocumentLabel | None = None
    long_documents: LongDocuments = ALL_DOCUMENTS

    @classmethod
    def from_training(cls, config: Any, *, label: DocumentLabel | None = None) -> "DatasetConfig":
        """The text of a stage that trains with `config.settings`, in windows of their context."""
        return cls(
            **get_text_options(config),
            data=config.data,
            eval_data=config.eval_data,
            columns=config.columns,
            context=config.settings.context,
            seed=config.settings.seed,
            label=label,
        )
