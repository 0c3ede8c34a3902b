"""Documents as an Arrow table: the columns of each kind, and the kind of a document by its columns."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets

from potstill.data.pack_fields import LABEL_FIELDS
from potstill.data.schema import Document, Kind

CHUNK = 4096  # documents held as Python objects at once; the others are in Arrow
TURNS = List({"role": Value("string"), "content": Value("large_string"), "fields": Value("large_string")})
TOOLS = Value("large_string")

FEATURES: Mapping[Kind, Features] = {
    "text": Features({"text": Value("large_string"), "whole": Value("bool")}),
    "pairs": Features({"prompt": Value("large_string"), "response": Value("large_string")}),
    "chat": Features({"messages": TURNS, "tools": TOOLS}),
    "preferences": Features(
        {"prompt": TURNS, "chosen": TURNS, "rejected": TURNS, "label": Value("bool"), "tools": TOOLS}
    ),
    "prompts": Features({"prompt": TURNS, "row": Value("large_string"), "tools": TOOLS}),
}


def get_kind(document: Mapping[str, Any]) -> Kind:
    """The kind of a document, by its columns."""
    if "chosen" in document:
        return "preferences"
    if "row" in document:
        return "prompts"
    return "chat" if "messages" in document else "pairs" if "prompt" in document else "text"


def get_features(document: Mapping[str, Any]) -> Features:
    """The columns and types of a corpus of documents like this one."""
    labels = {key: Value("int64") for key in LABEL_FIELDS if key in document}
    return Features({**FEATURES[get_kind(document)], **labels})


def build_table(documents: Iterable[Document]) -> Dataset:
    """The documents as an Arrow table, built chunk by chunk."""
    documents, chunks = iter(documents), []
    while chunk := list(islice(documents, CHUNK)):
        features = get_features(chunk[0])
        columns = {name: [document.get(name) for document in chunk] for name in features}
        chunks.append(Dataset.from_dict(columns, features=features))
    return concatenate_datasets(chunks) if chunks else Dataset.from_dict({})


def get_document_text(document: Mapping[str, Any]) -> str:
    """The text of a document; for a pair, a chat or a preference its turns with line breaks between them."""
    if "chosen" in document:
        return "\n".join(turn["content"] for part in ("prompt", "chosen", "rejected") for turn in document[part])
    if "messages" in document or "row" in document:
        turns = document["prompt" if "row" in document else "messages"]
        return "\n".join(turn["content"] for turn in turns)
    return document["text"] if "text" in document else f"{document['prompt']}\n{document['response']}"
