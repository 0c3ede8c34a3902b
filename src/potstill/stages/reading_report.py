"""What a stage says about the text that it read: on the screen, and in the card."""

from collections.abc import Iterator
from typing import Any

from potstill.data.corpus import HELD_OUT_DUPLICATE, Corpus
from potstill.data.packing import Packs
from potstill.data.row_reader import BAD_ROW
from potstill.data.token_dataset import TextReport
from potstill.data.tokenize import TEMPLATE_REFUSAL
from potstill.data.windows import describe_loss
from potstill.stages.console import print_note, print_warning


def report_reading(corpus: Corpus, packs: Packs, report: TextReport) -> None:
    """Print what of the text is not trained on: held-out files and documents, columns, and what does not fit."""
    if held_out := corpus.provenance.get("held_out"):
        print_note(f"{corpus.name}: held out by their names, never trained on: {', '.join(held_out)}")
    if num_duplicates := corpus.drop_counts.get(HELD_OUT_DUPLICATE):
        print_note(f"{corpus.name}: {num_duplicates:,} documents are held out too, and are left out of training")
    if unread := corpus.provenance.get("unread_text"):
        print_note(f"{corpus.name} has columns with text that are not read: {', '.join(unread)}")
    for sentence in (*describe_bad_rows(corpus, report), *report.describe()):
        print_note(f"{corpus.name}: {sentence}")
    for sentence in describe_loss(packs.counts):
        (print_warning if packs.counts.needs_warning else print_note)(f"{corpus.name}: {sentence}")


def describe_bad_rows(corpus: Corpus, report: TextReport) -> Iterator[str]:
    """A sentence for the rows that could not be read or rendered, with the first three of each; none without any."""
    for reason, examples in ((BAD_ROW, corpus.bad_rows), (TEMPLATE_REFUSAL, report.bad_rows)):
        if count := {**corpus.drop_counts, **report.drop_counts}.get(reason):
            yield f"left out {count:,} with {reason}: {'; '.join(examples)}"


def build_corpus_facts(corpus: Corpus, packs: Packs, report: TextReport) -> dict[str, Any]:
    """The facts of a corpus and its packs, for the card; `report` is what is odd about its documents."""
    drop_counts = {**corpus.drop_counts, **report.drop_counts}
    return {
        "trained_on": corpus.name,
        "kind": corpus.kind,
        "licence": corpus.license,
        "split": corpus.provenance.get("split", "all"),
        "documents": len(packs.lengths),
        "tokens": packs.num_tokens,
        "trained_share": packs.num_trained / packs.num_tokens,
        "fill": packs.fill,
        "text_digest": corpus.digest,
        "windows": packs.counts.to_dict(),
        **report.to_dict(),
        **({"dropped": drop_counts} if drop_counts else {}),
        "provenance": dict(corpus.provenance),
    }
