"""Preferences: two answers to a prompt, or one answer with a verdict, as messages, as documents and as batches.

    preference({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}).prompt
    [{'role': 'user', 'content': 'Hi'}]

The answers of a prompt are documents of one group. They share the prompt (`data.shared_prompts`):

    x_0 ... x_{p-1}   |   x_p a_1 ... a_m   |   x_p b_1 ... b_n
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from potstill.core.errors import DataError, UsageError
from potstill.core.types import CHOSEN, IGNORE, REJECTED, Batch
from potstill.data.corpus import Corpus
from potstill.data.mixture import load_mixture
from potstill.data.packing import collate, make_pack
from potstill.data.preference_schema import recognize_preferences
from potstill.data.shared_prompts import build_group
from potstill.data.token_dataset import TokenizedDocument
from potstill.data.turns import MalformedRow, Message, UntrainableRow, to_message


class Preference(NamedTuple):
    """A prompt and its answers, each a list of messages.

    Of a pair, `label` is None. An answer with a label is `chosen` where that is true, else `rejected`; the other side
    is empty. The last message of a side is its answer. Messages before it stand where the sides part earlier.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    label: bool | None = None


def preference(row: Mapping[str, Any], *, columns: Mapping[str, str] | None = None) -> Preference:
    """The preference in a row of any format of `data.preference_schema`; `columns` maps our names to those of the row.

    Raises: DataError for a row of no known format, one that cannot be read, or one that teaches nothing, such as equal
    sides or an empty answer.
    """
    schema = recognize_preferences(row, "the row", columns=columns)
    try:
        document = schema.to_document(row)
    except MalformedRow as error:
        raise DataError(f"the row {error}") from error
    except UntrainableRow as error:
        raise DataError(f"the row has {error}; leave it out") from error
    return to_preference(document)


def to_preference(document: Mapping[str, Any]) -> Preference:
    """A stored document of preferences as messages."""
    prompt, chosen, rejected = ([*map(to_message, document[name])] for name in ("prompt", "chosen", "rejected"))
    return Preference(prompt, chosen, rejected, document.get("label"))


def load_preferences(data: str | Sequence[str], *, split: str = "train", **options: Any) -> Corpus:
    """The preferences of one data set, or of several; `options` are those of `load_corpus`.

    They are held out by prompt: no prompt is both in the train and in the validation split of one data set.

    Raises: as `load_mixture` does; DataError for a data set without preferences; UsageError for a stream.
    """
    corpus = load_mixture(data, split=split, recognize=recognize_preferences, **options)
    corpus.require_end("preferences are held out by prompt")
    if corpus.kind != "preferences":
        raise DataError(f"{corpus.name} holds {corpus.kind} and no preferences; give rows with chosen and rejected")
    return corpus


def batch_of(pairs: Iterable[tuple[Sequence[int], Sequence[int], Sequence[int]]], *, shared: bool = True) -> Batch:
    """The batch of pairs, each the ids of (prompt, chosen answer, rejected answer), in their order.

    Every token of an answer is trained on. With `shared`, both answers of a pair see one copy of its prompt.

    Raises: UsageError without a pair, for a prompt without tokens, or for an answer without tokens.
    """
    documents: list[TokenizedDocument] = []
    for group, (prompt, *answers) in enumerate(pairs):
        if not prompt or not all(answers):
            raise UsageError("a pair lacks tokens; its prompt and each answer need at least one")
        first, second = (TokenizedDocument([*prompt, *ids], [IGNORE] * len(prompt) + [*ids]) for ids in answers)
        documents += build_group([first, second], (CHOSEN, REJECTED), group=group, shared=shared)
    if not documents:
        raise UsageError("there is no pair; give at least one")
    return collate([make_pack(documents)])
