"""Facts edited in several languages: shared neurons, those of one language, random ones, and one tuned layer.

Each method edits each fact alone, from the same model, with the same targets and the same rule to stop. The tuned layer
is the matrix that goes down in one feed-forward, trained on the sum of the targets' losses and put back after each fact
(FT of ROME, arXiv:2202.05262, without its clamp). Edits act where a prompt names their subject; a tuned layer acts
everywhere. The facts are the first of zsRE in BMIKE-53, of $POTSTILL_DATA or of `--data`.

    python benchmarks/editing.py --json

`--methods` chooses methods, so that several short runs make one table. `forced locality` is the agreement on unrelated
questions if each edit acts there too, at the last token of the question: what an edit alone does to a model.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.data.facts import Fact
from potstill.evaluate.editing import LOCALITY, answer_questions, list_questions, measure_edits, score_edits
from potstill.models.edits import Edit, Edits, attach_edits
from potstill.models.feed_forward import find_down_projections
from potstill.stages.edit import EditConfig
from potstill.stages.fact_editor import FactEditor
from potstill.transforms.fact_edit import score_target
from setting.document import command_line, document, parse_arguments, refuse_on_red

RESTS_ON = ["tests/transforms/test_fact_edit.py", "tests/models/test_edits.py", "tests/evaluate/test_editing.py"]
FOLDER = "unclear/kedit/ercong21__MultiKnow/data/BMIKE53/zsRE"
METHODS = ("shared", "one language", "random", "tuned layer")
GOALS = {
    "learned": "every fact is the greedy answer in every language with shared neurons",
    "locality": "edits change no answer to an unrelated question",
}


def main() -> None:
    """Refuses if a test fails, edits the facts with every method, prints one document."""
    parser = command_line(__doc__)
    parser.add_argument("--data", nargs="*", help="files of facts (default: zsRE of BMIKE-53 in fr and pt)")
    parser.add_argument("--languages", default="en,fr,pt", help="their languages (default en,fr,pt)")
    parser.add_argument("--facts", type=int, default=20, help="how many facts (default 20)")
    parser.add_argument("--methods", default=",".join(METHODS), help="the methods, with commas between them")
    parser.add_argument("--language", default="en", help="the one language whose neurons are edited (default en)")
    parser.add_argument("--layer", type=int, default=15, help="the layer that is tuned (default 15)")
    parser.add_argument("--rate", type=float, default=5e-4, help="the learning rate of the tuned layer (default 5e-4)")
    parser.add_argument("--paraphrases", type=int, default=4, help="paraphrases that locate neurons (default 4)")
    parser.add_argument("--max-tokens", type=int, default=16, help="most tokens of an answer (default 16)")
    parser.add_argument("--model", default="smollm2", help="the model (default smollm2)")
    options = parse_arguments(parser)
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    config = make_config(options)
    facts, loaded = config.load_facts(), config.load_base(config.find_base())
    editor = FactEditor(loaded=loaded, options=config)
    before = answer(editor, facts)
    paraphrases = editor.write_paraphrases(facts)
    figures: dict[str, Any] = {"facts": len(facts), "languages": options.languages, **editor.counts}
    figures["before"] = {"measures": describe(editor, facts, before, before)}
    for method in options.methods.split(","):
        start = time.perf_counter()
        if method == "tuned layer":
            result = measure_tuned_layer(editor, facts, before, options)
        else:
            result = measure_neurons(method, options, facts, paraphrases, loaded, before)
        figures[method] = {**result, "seconds": time.perf_counter() - start}
    shared = figures.get("shared", {})
    met = {
        "learned": shared.get("learned") == len(facts),
        "locality": all(figures[m]["measures"]["all"]["locality"] == 100 for m in METHODS[:3] if m in figures),
    }
    print(document("editing", figures, met, goals=GOALS))


def make_config(options: Any, neurons: str = "shared") -> EditConfig:
    """The options of `potstill edit`, on the chosen facts."""
    folder = Path(os.environ.get("POTSTILL_DATA", ".")) / FOLDER
    files = options.data or [str(folder / f"zsre_test_{language}.json.gz") for language in ("fr", "pt")]
    return EditConfig(
        model=options.model,
        facts=tuple(files),
        languages=options.languages,
        limit=options.facts,
        neurons=neurons,
        paraphrases=options.paraphrases,
        max_tokens=options.max_tokens,
    )


def measure_neurons(
    method: str, options: Any, facts: Sequence[Fact], paraphrases: Any, loaded: Any, before: Sequence[str]
) -> dict[str, Any]:
    """The measures of edits of neurons, and what each of them does to unrelated questions if it acts there."""
    neurons = options.language if method == "one language" else method
    editor = FactEditor(loaded=loaded, options=make_config(options, neurons))
    edited = [editor.edit(fact, texts, seed=n) for n, (fact, texts) in enumerate(zip(facts, paraphrases, strict=True))]
    attach_edits(loaded.model, Edits([fact.edit for fact in edited], editor.token_bytes))
    after = answer(editor, facts)
    forced = list(after)
    questions = list_questions(facts)
    for number, fact in enumerate(edited):
        chosen = [n for n, q in enumerate(questions) if q.fact == number and q.property == LOCALITY]
        triggers = tuple(questions[n].prompt for n in chosen)
        edit = Edit(triggers=triggers, prompts=(), deltas=fact.edit.deltas)
        attach_edits(loaded.model, Edits([edit], editor.token_bytes))
        for n, text in zip(chosen, answer(editor, facts, chosen), strict=True):
            forced[n] = text
    attach_edits(loaded.model, Edits([], editor.token_bytes))
    learned = [fact.learned for fact in edited]
    return {
        "measures": describe(editor, facts, after, before),
        "forced locality": describe(editor, facts, forced, before)["all"]["locality_f1"],
        "learned": sum(all(fact.is_greedy.values()) for fact in learned),
        "steps": sum(fact.steps for fact in learned) / len(learned),
        "neurons": sum(len(d.neurons) for fact in learned for d in fact.deltas.values()) / len(learned),
    }


def measure_tuned_layer(
    editor: FactEditor, facts: Sequence[Fact], before: Sequence[str], options: Any
) -> dict[str, Any]:
    """The measures of a layer that is trained on one fact at a time; each fact is measured on its own model."""
    weight: Any = find_down_projections(editor.loaded.model)[options.layer].weight
    original, questions, after = weight.detach().clone(), list_questions(facts), list(before)
    steps, learned = [], 0
    for number, fact in enumerate(facts):
        count, is_learned = tune(editor, fact, weight, rate=options.rate)
        steps.append(count)
        learned += is_learned
        chosen = [n for n, question in enumerate(questions) if question.fact == number]
        for n, text in zip(chosen, answer(editor, facts, chosen), strict=True):
            after[n] = text
        with torch.no_grad():
            weight.copy_(original)
    return {
        "measures": describe(editor, facts, after, before),
        "learned": learned,
        "steps": sum(steps) / len(steps),
        "neurons": original.shape[1],
    }


def tune(editor: FactEditor, fact: Fact, weight: Tensor, *, rate: float) -> tuple[int, bool]:
    """Trains one matrix until the targets are the greedy answers; the number of steps, and whether they are."""
    texts = [editor.encode_target(text) for text in fact.values()]
    weight.requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=rate)
    for step in range(editor.options.steps + 1):
        scores = []
        for text in texts:
            ids = torch.tensor([list(text.ids)])
            logits = editor.loaded.model(input_ids=ids, use_cache=False).logits[0, text.start - 1 : -1]
            scores.append(score_target(logits, ids[0, text.start :]))
        is_learned = all(score.is_greedy for score in scores)
        if is_learned or step == editor.options.steps:
            break
        (weight.grad,) = torch.autograd.grad(torch.stack([score.nll for score in scores]).sum(), [weight])
        optimizer.step()
    weight.requires_grad_(False)
    return step, is_learned


def answer(editor: FactEditor, facts: Sequence[Fact], chosen: Sequence[int] | None = None) -> list[str]:
    """The greedy answers to the questions, or to the `chosen` ones."""
    questions = list_questions(facts)
    selected = questions if chosen is None else [questions[n] for n in chosen]
    loaded, encode = editor.loaded, editor.encode
    return answer_questions(loaded.model, loaded.tokenizer, selected, encode, max_tokens=editor.options.max_tokens)


def describe(
    editor: FactEditor, facts: Sequence[Fact], after: Sequence[str], before: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Value and interval of each measure, by language."""
    scores = score_edits(list_questions(facts), after, before, editor.tokenize)
    measures = measure_edits(scores, facts)
    rows: dict[str, dict[str, Any]] = {}
    for language, row in measures.items():
        rows[language] = {measure.name: measure.value for measure in row}
        rows[language] |= {f"{measure.name} interval": [measure.low, measure.high] for measure in row}
    return rows


if __name__ == "__main__":
    main()
