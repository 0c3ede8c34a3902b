"""Edit: changes single facts of a model in several languages, and measures what else has changed.

    potstill edit smollm2 --facts facts.jsonl --out edited
    potstill generate edited --prompt "..."

The weights stay as they are. The folder names the model, and holds small changes of neurons that act on prompts which
name a subject (`models/edits.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from potstill.core.atomic_files import atomic_folder
from potstill.core.card import Card
from potstill.core.counts import count_noun
from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.errors import UsageError
from potstill.core.in_memory import IN_MEMORY
from potstill.core.measure import Measure
from potstill.core.screen import status, track
from potstill.data.facts import Fact, count_missing_subjects, list_languages, load_facts
from potstill.models.edit_folder import EditFolder, check_digest, copy_base, open_edits, save_edits
from potstill.models.edits import Edits, attach_edits
from potstill.models.load import LoadedModel, load_model
from potstill.models.locate import locate_model, split_size
from potstill.stages.console import explain_write_errors, get_command, print_note
from potstill.stages.edit_evaluation import answer_facts, measure_answers
from potstill.stages.edit_options import EditOptions
from potstill.stages.fact_editor import EditedFact, FactEditor, check_neurons
from potstill.stages.option_checks import check_single_process
from potstill.stages.preflight import StageInputs
from potstill.stages.run_folder import reserve_output
from potstill.stages.stage import make_parent, to_plain_dict
from potstill.stages.text_options import prepare_tokenizer


@dataclass(frozen=True, kw_only=True)
class EditConfig(EditOptions):
    """Edits `facts` in `model`: for each, one change of the neurons that it activates in all languages.

    Source: Zhang et al. (arXiv:2406.16416). No official code exists; `transforms/neurons.py`, `transforms/fact_edit.py`
    and `models/edits.py` say what is reconstructed.
    """

    kind: ClassVar[str] = "edit"

    @property
    def data(self) -> str | tuple[str, ...]:
        """The facts, under the name that other stages have for what they read."""
        return self.facts

    @property
    def sources(self) -> tuple[str, ...]:
        """The files and folders of the facts."""
        return (self.facts,) if isinstance(self.facts, str) else tuple(self.facts)

    @property
    def inputs(self) -> StageInputs:
        """What the stage reads."""
        return StageInputs(models=(self.model,), data=self.sources)

    def to_dict(self) -> dict[str, Any]:
        """The stage and its options as plain data."""
        return to_plain_dict(self)

    def load_facts(self) -> list[Fact]:
        """The facts to edit.

        Raises: NotFound, DataError, UsageError, also for neurons of a language that a fact lacks.
        """
        languages = tuple(filter(None, map(str.strip, self.languages.split(","))))
        facts = load_facts(self.sources, languages=languages, limit=self.limit)
        check_neurons(self.neurons, facts)
        return facts

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False) -> Card:
        """Edits the facts, and writes edits and card to `out`; the folder appears only once it is complete.

        Raises: UsageError, NotFound, DataError, UnsupportedModel, OutputExists before anything is written.
        """
        check_single_process()
        with reserve_output(out, self.inputs, overwrite=overwrite):
            facts, origin = self.load_facts(), self.find_base()
            loaded = self.load_base(origin)
            editor = FactEditor(loaded=loaded, options=self)
            similarity = self.similarity or origin.similarity
            if not similarity:
                editor.check_triggers(facts, origin.edits)
            edited_facts = self._edit(editor, facts)  # by the base alone, without edits
            attach_edits(loaded.model, Edits(origin.edits, editor.token_bytes, similarity=origin.similarity))
            before = answer_facts(editor, facts) if self.measure else []
            edits = [*origin.edits, *(fact.edit for fact in edited_facts)]
            attach_edits(loaded.model, Edits(edits, editor.token_bytes, similarity=similarity))
            measures = measure_answers(editor, facts, answer_facts(editor, facts), before) if self.measure else {}
            card = self._make_card(loaded, facts, edited_facts, measures, editor)
            with explain_write_errors(out), atomic_folder(out, overwrite=overwrite) as folder:
                name, is_given = origin.base, self.chat_template is not None
                if self.copy_model or self.model.startswith(IN_MEMORY):
                    name = copy_base(locate_model(name), folder)
                save_edits(
                    folder,
                    EditFolder(
                        base=name,
                        digest=loaded.digest,
                        edits=tuple(edits),
                        similarity=similarity,
                        chat_template=loaded.tokenizer.chat_template if is_given else origin.chat_template,
                    ),
                )
                card.write(folder)
        return card

    def find_base(self) -> EditFolder:
        """The model whose neurons change, with the edits that it has; new edits are added to those.

        Raises: UsageError for a size of an elastic model; NotFound, ArtifactError.
        """
        if split_size(self.model).share is not None:
            raise UsageError(f"{self.model} is a size of an elastic model, and edits fit whole models; omit the size")
        path = locate_model(self.model, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)
        folder = open_edits(self.model, path)
        if folder.edits:
            print_note(f"{self.model} holds {count_noun(len(folder.edits), 'edit')}, to which the new ones are added")
        return folder

    def load_base(self, origin: EditFolder) -> LoadedModel:
        """The model that edits belong to, frozen, with the chat template of the options or of the edits.

        Raises: ArtifactError for other weights than those of the edits that it has; as `load_model` does.
        """
        device = resolve_device(self.device)
        loaded = load_model(
            origin.base, device=device, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code
        )
        if origin.edits:
            check_digest(locate_model(self.model), origin, loaded.digest)
        if origin.chat_template is not None:
            loaded.tokenizer.chat_template = origin.chat_template
        if self.dtype != "auto":
            loaded.move_to(device, resolve_dtype(self.dtype))
        loaded.model.requires_grad_(False)
        prepare_tokenizer(loaded.tokenizer, self)
        return loaded

    def _edit(self, editor: FactEditor, facts: Sequence[Fact]) -> list[EditedFact]:
        with status("writing paraphrases"):
            paraphrases = editor.write_paraphrases(facts)
        pairs = list(zip(facts, paraphrases, strict=True))
        return [
            editor.edit(fact, texts, seed=self.seed + number)
            for number, (fact, texts) in enumerate(track(pairs, "editing facts"))
        ]

    def _make_card(
        self,
        loaded: LoadedModel,
        facts: Sequence[Fact],
        edited_facts: Sequence[EditedFact],
        measures: dict[str, list[Measure]],
        editor: FactEditor,
    ) -> Card:
        missing = count_missing_subjects(facts)
        if missing:
            print_note(
                f"{count_noun(missing, 'question')} does not name its subject, so the whole question is the trigger"
                if missing == 1
                else f"{missing:,} questions do not name their subject, so the whole question is the trigger"
            )
        return Card(
            stage=self.to_dict(),
            seed=self.seed,
            parents=[make_parent("edited from", loaded, name=self.model if self.model.startswith(IN_MEMORY) else None)],
            data={"facts": len(facts), "languages": list_languages(facts), "sources": list(self.sources)},
            measures=measures,
            details={
                "facts": len(edited_facts),
                "greedy": sum(all(fact.learned.is_greedy.values()) for fact in edited_facts),
                "questions_without_subject": missing,
                **editor.counts,
                "edits": [fact.to_dict() for fact in edited_facts],
            },
            command=get_command(),
        )
