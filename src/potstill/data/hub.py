"""Reads data sets of the Hugging Face hub: streamed, or from the local cache when offline."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi

from potstill.core.errors import DataError, NotFound, PotstillError, get_first_line

# owner/name, a revision after @, and a configuration after a colon
DATASET_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?(:[\w.-]+)?")


class HubDataset:
    """A hub data set at one revision: its splits, its license and its rows."""

    def __init__(self, name: str) -> None:
        self.name = name
        location, _, config = name.partition(":")
        repository, _, revision = location.partition("@")
        self.repository, self.config = repository, config or None
        self.is_offline = datasets.config.HF_HUB_OFFLINE
        self.revision: str | None = revision or None
        self.license: str | None = None
        if not self.is_offline:
            self._fetch_info()

    def _fetch_info(self) -> None:
        with explain_hub_errors(self.name):
            info = HfApi().dataset_info(self.repository, revision=self.revision)
        self.revision = info.sha
        card = info.card_data
        self.license = None if card is None else str(card.get("license") or "") or None

    def list_splits(self) -> list[str]:
        """The names of the splits.

        Raises: NotFound, DataError.
        """
        with explain_hub_errors(self.name):
            return list(
                datasets.get_dataset_split_names(self.repository, config_name=self.config, revision=self.revision)
            )

    def load_rows(self, split: str) -> Any:
        """The rows of one split: an `IterableDataset`, or a `Dataset` when offline.

        Raises: NotFound, DataError.
        """
        with explain_hub_errors(self.name):
            return datasets.load_dataset(
                self.repository, self.config, split=split, revision=self.revision, streaming=not self.is_offline
            )


@contextmanager
def explain_hub_errors(name: str) -> Iterator[None]:
    """Turns any error of the libraries below into a NotFound or DataError of one sentence."""
    try:
        yield
    except PotstillError:
        raise
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        offline_note = " (HF_HUB_OFFLINE is set)" if datasets.config.HF_HUB_OFFLINE else ""
        raise NotFound(
            f"{name} is not a file or folder here, and the hub has no such data set{offline_note}"
        ) from error
    except Exception as error:  # a boundary: the HTTP libraries raise errors of many types
        raise DataError(
            f"{name} is not a file or folder here, and the hub's data set cannot be read: {get_first_line(error)}"
        ) from error
