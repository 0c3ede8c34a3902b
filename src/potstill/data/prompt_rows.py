"""Prompts that a model answers in training, each with its row, from which a reward reads `answer` or `language`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from potstill.core.errors import DataError
from potstill.core.types import IGNORE
from potstill.data.corpus import Corpus
from potstill.data.mixture import load_mixture
from potstill.data.pack_fields import ROW_NUMBERS
from potstill.data.packing import Packs
from potstill.data.prompt_schema import recognize_prompts
from potstill.data.prompts import PromptTokenizer
from potstill.data.turns import to_message
from potstill.data.windows import WindowCounts


class Prompt(NamedTuple):
    """The token ids of a prompt with the words that open an answer, its last message, and its row in the data set."""

    input_ids: Sequence[int]
    text: str
    row: Mapping[str, Any]


def load_prompts(data: str | Sequence[str], *, split: str = "train", **options: Any) -> Corpus:
    """The prompts of one data set, or of several; `options` are those of `load_corpus`. They are held out by prompt.

    Raises: as `load_mixture` does; UsageError for a stream.
    """
    corpus = load_mixture(data, split=split, recognize=recognize_prompts, **options)
    corpus.require_end("a part of its prompts is held out")
    return corpus


def read_prompts(
    documents: Iterable[Mapping[str, Any]], tokenizer: PromptTokenizer, *, columns: Sequence[str] = ()
) -> list[Prompt]:
    """The prompts of stored documents, in their order. Every row must have `columns`, which a reward reads.

    Raises: DataError for a row without such a column, or a prompt that the chat template refuses.
    """
    prompts = []
    for document in documents:
        row, messages = json.loads(document["row"]), [*map(to_message, document["prompt"])]
        if missing := [column for column in columns if row.get(column) is None]:
            raise DataError(
                f"the row of {messages[-1]['content'][:60]!r} has no {missing[0]!r}, which the reward reads; add the "
                f"column, or choose another --reward"
            )
        tools = json.loads(document["tools"]) if document.get("tools") else None
        prompts.append(Prompt(tokenizer.encode(messages, tools=tools), messages[-1]["content"], row))
    return prompts


def pack_prompts(prompts: Sequence[Prompt]) -> Packs:
    """A pack for each prompt: one document without labels, whose field `rows` is its number.

    Raises: DataError without a prompt.
    """
    if not prompts:
        raise DataError("there is no prompt to answer")
    lengths = np.array([len(prompt.input_ids) for prompt in prompts], dtype=np.int32)
    input_ids = np.concatenate([np.array(prompt.input_ids, dtype=np.int32) for prompt in prompts])
    longest = int(lengths.max())
    return Packs(
        input_ids=input_ids,
        labels=np.full(len(input_ids), IGNORE, dtype=np.int32),
        lengths=lengths,
        token_offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        document_offsets=np.arange(len(prompts) + 1, dtype=np.int64),
        length=longest,
        counts=WindowCounts(documents=len(prompts), context=longest),
        fields={ROW_NUMBERS.name: np.arange(len(prompts), dtype=np.int32)},
    )
