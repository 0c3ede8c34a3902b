"""The documents of the benchmarks: docstrings of Python's library, ragged and real."""

import json
from pathlib import Path

CONTEXT = 512


def documents(steps: int, tokens: int) -> list[list[list[int]]]:
    """For each step documents of about `tokens` tokens, in the order of the corpus, cut to `CONTEXT`."""
    from potstill.data.chat import tokenise
    from potstill.data.corpus import load_corpus
    from potstill.models import gguf, load

    rows = tokenise(load_corpus("stdlib"), gguf.load_tokenizer(load.packaged()), limit=steps * tokens * 2)
    found: list[list[list[int]]] = [[]]
    for row in rows:
        if sum(map(len, found[-1])) + len(row.input_ids) > tokens:
            if len(found) == steps:
                break
            found.append([])
        found[-1].append(row.input_ids[:CONTEXT])
    return found


def write_texts(file: Path, number: int) -> None:
    """The first `number` documents as they were before they became tokens, one JSON object a line."""
    from potstill.data.corpus import load_corpus

    rows = load_corpus("stdlib").documents.take(number)
    file.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows), encoding="utf-8")
