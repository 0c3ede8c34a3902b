"""Describes a data set and its trained tokens: as a dictionary for JSON, and in color for the terminal."""

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
from potstill.data.corpus import Corpus
from potstill.data.document_table import get_document_text
from potstill.data.packing import pack
from potstill.data.token_dataset import TokenDataset, TokenizedDocument
from potstill.data.tokenize import Rendering, tokenize_corpus
from potstill.data.windows import COVERED_PERCENTILE, describe_loss

MAX_STREAMED_TOKENS = 200_000  # tokens read of a stream
HEAD_TOKENS, TAIL_TOKENS = 80, 40  # tokens shown of a long run
PERCENTILES = (10, 50, 90, 100)
TRAINED_STYLE, REJECTED_STYLE, CONTEXT_STYLE = "bold green", "bold red", "dim"


def describe(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    examples: int = 3,
    length: int | None = None,
    limit: int | None = None,
    rendering: Rendering | None = None,
) -> dict[str, Any]:
    """Kind, size, share of trained tokens, lengths and some `examples` of a corpus, as plain data.

    With `length` it also packs the corpus and reports how full the packs are. `limit` stops after so many tokens; of a
    stream at most `MAX_STREAMED_TOKENS` are read.

    Raises: DataError as `tokenize_corpus` does.
    """
    is_stored = isinstance(corpus.documents, Dataset)
    tokens = tokenize_corpus(
        corpus, tokenizer, limit=limit or (None if is_stored else MAX_STREAMED_TOKENS), rendering=rendering
    )
    lengths = np.diff(tokens.ends, prepend=0)
    indices = [round(position) for position in np.linspace(0, len(tokens) - 1, min(examples, len(tokens)))]
    description = {
        "name": corpus.name,
        "kind": corpus.kind,
        "documents": len(tokens),
        "tokens": tokens.num_tokens,
        "trained_tokens": tokens.num_trained,
        "trained_share": tokens.num_trained / tokens.num_tokens,
        "bytes": sum(len(get_document_text(document).encode()) for document in corpus.documents) if is_stored else None,
        "token_percentiles": {str(p): round(float(np.percentile(lengths, p))) for p in PERCENTILES},
        "last_trained": count_last_trained(tokens, tokenizer),
        "dropped": {**corpus.drop_counts, **tokens.drop_counts},
        "bad_rows": [*corpus.bad_rows, *tokens.report.bad_rows],
        **tokens.report.to_dict(),
        "licence": corpus.license,
        "digest": corpus.digest,
        "provenance": dict(corpus.provenance),
        "examples": [
            {"document": int(tokens.documents[i]), "pieces": split_pieces(tokens[i], tokenizer)} for i in indices
        ],
    }
    return description if length is None else {**description, "packs": describe_packs(tokens, length)}


def describe_packs(tokens: Sequence[TokenizedDocument], length: int) -> dict[str, Any]:
    """The number of packs of `length` tokens, how full they are, and what the documents lost to the length."""
    packs = pack(tokens, length=length)
    return {
        "length": length,
        "count": len(packs),
        "fill": packs.fill,
        "windows": packs.counts.to_dict(),
        "loss": describe_loss(packs.counts),
    }


def count_last_trained(tokens: TokenDataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The three most frequent last trained tokens of documents that have one. The first should be the stop token."""
    last_labels = Counter(label for row in tokens for label in [*filter(IGNORE.__ne__, row.labels)][-1:])
    return {str(tokenizer.decode([token])): count for token, count in last_labels.most_common(3)}


def split_pieces(row: TokenizedDocument, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The text of a document in runs of trained and of other tokens; long runs without their middle."""
    return [
        {"text": text, "trained": is_trained, "omitted_tokens": num_omitted}
        for is_trained, run in groupby(range(len(row.labels)), key=lambda t: row.labels[t] != IGNORE)
        for text, num_omitted in _shorten_run([row.input_ids[t] for t in run], tokenizer)
    ]


def _shorten_run(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, int]]:
    num_omitted = len(ids) - HEAD_TOKENS - TAIL_TOKENS
    if num_omitted <= 0:
        yield _decode_tokens(ids, tokenizer), 0
    else:
        yield _decode_tokens(ids[:HEAD_TOKENS], tokenizer), num_omitted
        yield _decode_tokens(ids[-TAIL_TOKENS:], tokenizer), 0


def _decode_tokens(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def render(description: Mapping[str, Any], *, marks: bool = False) -> RenderableType:
    """A description as a table and examples, for rich; `marks` puts trained text in ⟦ ⟧, for output without color."""
    return Group(
        _build_summary(description),
        *(_render_example(example, marks) for example in description["examples"]),
        _render_legend(marks),
    )


def _build_summary(description: Mapping[str, Any]) -> Table:
    lengths, packs = description["token_percentiles"], description.get("packs")
    lines = {
        "kind": description["kind"],
        "documents": f"{description['documents']:,}",
        "bytes": "unknown, a stream" if description["bytes"] is None else f"{description['bytes']:,}",
        "tokens": f"{description['tokens']:,}",
        "trained on": f"{description['trained_tokens']:,} tokens ({description['trained_share']:.1%})",
        "tokens a document": f"median {lengths['50']}, 90 % at most {lengths['90']}, longest {lengths['100']}",
        "last trained": ", ".join(f"{token!r} {count:,} times" for token, count in description["last_trained"].items()),
        "dropped": ", ".join(f"{count:,} {reason}" for reason, count in description["dropped"].items()) or "nothing",
        "left out, such as": "; ".join(description["bad_rows"]) or "nothing",
        "control tokens in text": f"{description.get('control_tokens_in_text', 0):,}",
        "held out": ", ".join(description["provenance"].get("held_out", [])) or "nothing by its name",
        "not read": ", ".join(description["provenance"].get("unread_text", [])) or "nothing",
        "licence": description["licence"] or "not stated",
        "split": description["provenance"].get("split", "all"),
        "sha-256": description["digest"] or "none, a stream",
    }
    lines |= _list_sides(description["preferences"]) if "preferences" in description else {}
    if packs:
        lines["packs"] = f"{packs['count']:,} of {packs['length']} tokens, {packs['fill']:.1%} full"
        lines |= {"cut": "; ".join(packs["loss"])} if packs["loss"] else {}
    table = Table(title=Text(description["name"]), show_header=False, title_justify="left")
    for name, value in lines.items():
        table.add_row(name, Text(str(value)))
    return table


def _list_sides(counts: Mapping[str, Any]) -> dict[str, str]:
    """What is said of the two sides of preferences."""
    shorter = counts["shorter_is_chosen"]
    lines = {
        side: f"{counts[side]:,} answers of {counts[f'{side}_tokens']:,} tokens, on average"
        for side in ("chosen", "rejected")
    }
    lines |= {} if shorter is None else {"shorter is chosen": f"in {shorter:.1%} of the pairs that differ in length"}
    too_long = f"{counts['too_long']:,} are left out; --context {counts['covering']} holds {COVERED_PERCENTILE} %"
    return lines | ({"too long": too_long} if counts.get("too_long") else {})


def _render_example(example: Mapping[str, Any], marks: bool) -> Text:
    text = Text.assemble((f"\ndocument {example['document']}\n", "bold"))
    _append_pieces(text, example["pieces"], TRAINED_STYLE, marks)
    for side, pieces in example.get("sides", {}).items():
        text.append(f"\n{side}\n", style="bold")
        _append_pieces(text, pieces, REJECTED_STYLE if side == "rejected" else TRAINED_STYLE, marks)
    return text


def _append_pieces(text: Text, pieces: Sequence[Mapping[str, Any]], trained_style: str, marks: bool) -> None:
    for piece in pieces:
        words = piece["text"].replace("\n", "↵\n")
        words = f"⟦{words}⟧" if marks and piece["trained"] else words
        text.append(words, style=trained_style if piece["trained"] else CONTEXT_STYLE)
        if piece["omitted_tokens"]:
            text.append(f" [... {piece['omitted_tokens']} tokens ...] ", style="italic")


def _render_legend(marks: bool) -> Text:
    if marks:
        return Text("\n⟦trained on⟧  read only")
    return Text.assemble("\n", ("trained on", TRAINED_STYLE), "  ", ("read only", CONTEXT_STYLE))
