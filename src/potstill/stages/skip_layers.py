"""Skip layers: finds the layers that a model leaves out to draft for itself, on prompts of yours and on this machine.

    potstill run self-speculative --teacher MODEL --data prompts.jsonl --out made

Nothing is trained. The result is a line of the card: what to give as `--draft`, with the speed-up that it predicts. A
search that was stopped starts again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from potstill.core.atomic_files import atomic_folder
from potstill.core.card import Card
from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.errors import UsageError
from potstill.core.measure import Measure
from potstill.core.measure_table import MEASURES
from potstill.core.options import ALLOW_PICKLE, DEVICE, DTYPE, SEED, TRUST_REMOTE_CODE
from potstill.data.corpus import Corpus
from potstill.evaluate.self_speculation import search_layers
from potstill.evaluate.skip_search import SkipSearch, SkipSet, format_layers
from potstill.evaluate.target_text import list_prompts
from potstill.models.causality import require_causal
from potstill.models.load import LoadedModel, load_model
from potstill.stages.console import explain_write_errors, get_command, print_note
from potstill.stages.corpus import load_data
from potstill.stages.option_checks import check_single_process
from potstill.stages.options import COLUMNS, DATA, TextOptions
from potstill.stages.preflight import StageInputs
from potstill.stages.run_folder import reserve_output
from potstill.stages.stage import make_parent, to_plain_dict
from potstill.stages.text_options import prepare_tokenizer


@dataclass(frozen=True, kw_only=True)
class SkipLayersConfig(TextOptions):
    """Searches the layers of `model` to skip, on its greedy answers to the first `documents` prompts of `data`.

    An answer has at most `max_tokens` tokens, and a draft at most `longest`. The search measures at most
    `max_evaluations` sets of layers, each in one pass over the answers. The seed changes nothing.

    Raises: UsageError for an option out of its range.
    """

    kind: ClassVar[str] = "skip-layers"

    model: str
    data: str | tuple[str, ...] = DATA.default
    columns: str = COLUMNS.default
    documents: int = 8
    max_tokens: int = 64
    longest: int = 8
    max_evaluations: int = 150
    seed: int = SEED.default
    device: str = DEVICE.default
    dtype: str = DTYPE.default
    allow_pickle: bool = ALLOW_PICKLE.default
    trust_remote_code: bool = TRUST_REMOTE_CODE.default

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, minimum in (("documents", 1), ("max_tokens", 2), ("longest", 1), ("max_evaluations", 1)):
            if getattr(self, name) < minimum:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")

    def to_dict(self) -> dict[str, Any]:
        """The stage and its options as plain data."""
        return to_plain_dict(self)

    @property
    def inputs(self) -> StageInputs:
        """What the stage reads."""
        return StageInputs(models=(self.model,), data=(self.data,))

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False) -> Card:
        """Searches, and writes the card to `out`.

        Raises: UsageError, NotFound, DataError, UnsupportedModel, OutputExists before anything is written.
        """
        check_single_process()
        with reserve_output(out, self.inputs, overwrite=overwrite):
            loaded = load_model(self.model, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)
            require_causal(loaded.model, "the model")
            prepare_tokenizer(loaded.tokenizer, self)
            device = resolve_device(self.device)
            loaded.move_to(device, resolve_dtype(self.dtype, device_type=str(device)))
            corpus = load_data(self, split="all")
            prompts = list_prompts(
                corpus,
                loaded,
                limit=self.documents,
                max_new_tokens=self.max_tokens,
                special_in_text=self.special_in_text,
            )
            search = search_layers(
                loaded,
                prompts,
                max_new_tokens=self.max_tokens,
                longest=self.longest,
                max_evaluations=self.max_evaluations,
            )
            card = self.make_card(loaded, corpus, search)
            with explain_write_errors(out), atomic_folder(out, overwrite=overwrite) as folder:
                card.write(folder)
        print_note(card.details["advice"])
        return card

    def make_card(self, loaded: LoadedModel, corpus: Corpus, search: SkipSearch) -> Card:
        """The card: the best set, what it reaches, and what the prediction rests on."""
        best, draft = search.best, f"skip:{format_layers(search.best.layers)}"
        return Card(
            stage=self.to_dict(),
            seed=self.seed,
            parents=[make_parent("model", loaded)],
            data={"searched_on": corpus.name, "kind": corpus.kind, "answers": len(best.matches.texts)},
            measures={draft: measure_set(best)},
            details={
                "draft": draft,
                "draft_length": best.draft_length,
                "advice": self._format_advice(best, draft),
                "skipped": list(best.layers),
                "speed_up_by_length": {length: best.predict(length) for length in best.costs.verify},
                "draft_cost": best.costs.draft,
                "cost_without_layers": search.costs.base,
                "verify_cost_by_length": dict(best.costs.verify),
                "evaluations": len(search.sets),
            },
            command=get_command(),
        )

    def _format_advice(self, best: SkipSet, draft: str) -> str:
        if best.speed_up > 1:
            command = f"potstill generate {self.model} --draft {draft} --draft-length {best.draft_length}"
            return f"{command} is predicted to be {best.speed_up:.2f} times as fast as plain decoding"
        return (
            f"no layers pay when they are skipped: the best, {draft}, is predicted to be {best.speed_up:.2f} times as "
            f"fast as plain decoding; omit --draft"
        )


def measure_set(best: SkipSet) -> list[Measure]:
    """`acceptance`, `tokens_per_pass` and `predicted_speed_up` at the best length, on the text of the search."""
    note = f"drafts of {best.draft_length} tokens, on the text that the search read"
    measures = best.matches.measure(best.draft_length)
    return [*measures, MEASURES["predicted_speed_up"].build(best.speed_up, len(best.matches.texts), note=note)]
