"""What a data set is, and which of its tokens are trained on: as a dictionary for machines, and coloured for people."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from potstill.core.types import IGNORE
from potstill.data.chat import tokenise
from potstill.data.corpus import Corpus, said
from potstill.data.pack import pack
from potstill.data.tokens import Tokenised, TokenSet

STREAMED = 200_000  # tokens of a stream that are looked at
HEAD, TAIL = 80, 40  # tokens shown of a longer run
PERCENTILES = (10, 50, 90, 100)
TRAINED, READ = "bold green", "dim"


def describe(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    examples: int = 3,
    length: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Kind, size, share of trained tokens, lengths and some `examples` of a corpus, ready for JSON.

    `length` packs it too and states how full the packs are. `limit` stops after so many tokens; of a stream the first
    `STREAMED` are read.

    Raises: DataError if it tokenises to nothing, or would be trained on by mistake.
    """
    whole = isinstance(corpus.documents, Dataset)
    tokens = tokenise(corpus, tokenizer, limit=limit or (None if whole else STREAMED))
    lengths = np.diff(tokens.ends, prepend=0)
    shown = [round(place) for place in np.linspace(0, len(tokens) - 1, min(examples, len(tokens)))]
    description = {
        "name": corpus.name,
        "kind": corpus.kind,
        "documents": len(tokens),
        "tokens": tokens.tokens,
        "trained_tokens": tokens.trained,
        "trained_share": tokens.trained / tokens.tokens,
        "bytes": sum(len(said(one).encode()) for one in corpus.documents) if whole else None,
        "token_percentiles": {str(p): round(float(np.percentile(lengths, p))) for p in PERCENTILES},
        "last_trained": last_trained(tokens, tokenizer),
        "dropped": {**corpus.dropped, **tokens.dropped},
        "licence": corpus.licence,
        "digest": corpus.digest,
        "provenance": dict(corpus.provenance),
        "examples": [{"document": int(tokens.documents[i]), "pieces": pieces(tokens[i], tokenizer)} for i in shown],
    }
    return description if length is None else {**description, "packs": packed(tokens, length)}


def packed(tokens: TokenSet, length: int) -> dict[str, Any]:
    """How the documents lie in packs of `length` tokens."""
    packs = pack(tokens, length=length)
    return {"length": length, "count": len(packs), "fill": packs.fill, "cut_documents": packs.cut}


def last_trained(tokens: TokenSet, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The three tokens that most often are the last one trained on in a document: the stop token, if all is well."""
    last = Counter(next(label for label in reversed(row.labels) if label != IGNORE) for row in tokens)
    return {str(tokenizer.decode([token])): count for token, count in last.most_common(3)}


def pieces(row: Tokenised, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The text of a document in runs of tokens that are trained on and that are not; long ones without their middle."""
    return [
        {"text": text, "trained": trained, "omitted_tokens": omitted}
        for trained, run in groupby(range(len(row.labels)), key=lambda t: row.labels[t] != IGNORE)
        for text, omitted in _shortened([row.input_ids[t] for t in run], tokenizer)
    ]


def _shortened(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, int]]:
    omitted = len(ids) - HEAD - TAIL
    if omitted <= 0:
        yield _decoded(ids, tokenizer), 0
    else:
        yield _decoded(ids[:HEAD], tokenizer), omitted
        yield _decoded(ids[-TAIL:], tokenizer), 0


def _decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def render(description: Mapping[str, Any]) -> RenderableType:
    """A description as a table and coloured examples, to be printed by rich."""
    return Group(_summary(description), *(_example(example) for example in description["examples"]), _legend())


def _summary(said: Mapping[str, Any]) -> Table:
    lengths, packs = said["token_percentiles"], said.get("packs")
    lines = {
        "kind": said["kind"],
        "documents": f"{said['documents']:,}",
        "bytes": "unknown, a stream" if said["bytes"] is None else f"{said['bytes']:,}",
        "tokens": f"{said['tokens']:,}",
        "trained on": f"{said['trained_tokens']:,} tokens ({said['trained_share']:.1%})",
        "tokens a document": f"median {lengths['50']}, 90 % at most {lengths['90']}, longest {lengths['100']}",
        "last trained": ", ".join(f"{token!r} {count:,} times" for token, count in said["last_trained"].items()),
        "dropped": ", ".join(f"{count:,} {reason}" for reason, count in said["dropped"].items()) or "nothing",
        "licence": said["licence"] or "not stated",
        "split": said["provenance"].get("split", "all"),
        "sha-256": said["digest"] or "none, a stream",
    }
    if packs:
        lines["packs"] = f"{packs['count']:,} of {packs['length']} tokens, {packs['fill']:.1%} full"
    table = Table(title=Text(said["name"]), show_header=False, title_justify="left")
    for name, value in lines.items():
        table.add_row(name, Text(str(value)))
    return table


def _example(example: Mapping[str, Any]) -> Text:
    text = Text.assemble((f"\ndocument {example['document']}\n", "bold"))
    for piece in example["pieces"]:
        text.append(piece["text"].replace("\n", "↵\n"), style=TRAINED if piece["trained"] else READ)
        if piece["omitted_tokens"]:
            text.append(f" [... {piece['omitted_tokens']} tokens ...] ", style="italic")
    return text


def _legend() -> Text:
    return Text.assemble("\n", ("trained on", TRAINED), "  ", ("read only", READ))
