"""Data sets of the Hugging Face hub, read as a stream; offline, those that its cache holds whole."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi

from potstill.core.errors import DataError, NotFound, PotstillError

DATASET_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")  # owner/name, and a configuration after a colon


class HubDataset:
    """A hub data set at one revision: its splits, its licence and its rows."""

    def __init__(self, name: str) -> None:
        self.name = name
        repository, _, config = name.partition(":")
        self.repository, self.config = repository, config or None
        self.is_offline = datasets.config.HF_HUB_OFFLINE
        self.revision: str | None = None
        self.license: str | None = None
        if not self.is_offline:
            self._fetch_info()

    def _fetch_info(self) -> None:
        with explain_hub_errors(self.name):
            info = HfApi().dataset_info(self.repository)
        self.revision = info.sha
        card = info.card_data
        self.license = None if card is None else str(card.get("license") or "") or None

    def list_splits(self) -> list[str]:
        """The names of its splits.

        Raises: NotFound, DataError.
        """
        with explain_hub_errors(self.name):
            return list(
                datasets.get_dataset_split_names(self.repository, config_name=self.config, revision=self.revision)
            )

    def load_rows(self, split: str) -> Any:
        """The rows of one split: an `IterableDataset`; offline a `Dataset`.

        Raises: NotFound, DataError.
        """
        with explain_hub_errors(self.name):
            return datasets.load_dataset(
                self.repository, self.config, split=split, revision=self.revision, streaming=not self.is_offline
            )


@contextmanager
def explain_hub_errors(name: str) -> Iterator[None]:
    """Says in one sentence why a data set of the hub cannot be read, whichever library below found out."""
    try:
        yield
    except PotstillError:
        raise
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        offline_note = " (HF_HUB_OFFLINE is set)" if datasets.config.HF_HUB_OFFLINE else ""
        raise NotFound(f"{name} is no file or folder here, and the hub gives no such data set{offline_note}") from error
    except Exception as error:  # a boundary: which HTTP library raises what is not ours to know
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"{name} is no file or folder here, and the hub's set cannot be read: {first_line}") from error
