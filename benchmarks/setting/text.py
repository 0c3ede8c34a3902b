"""The documents of the benchmarks: docstrings of Python's standard library, ragged and real."""

import json
from pathlib import Path

CONTEXT = 512


def load_documents(steps: int, tokens: int) -> list[list[list[int]]]:
    """For each step, documents of at most `tokens` tokens in the order of the corpus, cut to `CONTEXT`."""
    from potstill.data.corpus import load_corpus
    from potstill.data.tokenize import tokenize_corpus
    from potstill.models import gguf, locate

    rows = tokenize_corpus(
        load_corpus("stdlib"), gguf.load_tokenizer(locate.get_packaged_path()), limit=steps * tokens * 2
    )
    batches: list[list[list[int]]] = [[]]
    for row in rows:
        ids = row.input_ids[:CONTEXT]
        if sum(map(len, batches[-1])) + len(ids) > tokens:
            if len(batches) == steps:
                break
            batches.append([])
        batches[-1].append(ids)
    return batches


def write_texts(folder: Path, number: int) -> None:
    """Writes the texts of the first `number` documents as a data set that holds nothing out.

    `load_corpus` holds out a share of its own unless files are named train and validation.
    """
    from potstill.data.corpus import load_corpus

    rows = [json.dumps({"text": row["text"]}) + "\n" for row in load_corpus("stdlib").documents.take(number)]
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "validation.jsonl").write_text(rows[0], encoding="utf-8")
