"""Edits the facts of one model: questions as token ids, neurons of each language, and the learned changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from potstill.core.errors import DataError, UsageError
from potstill.core.suggestions import suggest
from potstill.data.facts import Fact, FactText, list_languages
from potstill.data.prompts import PromptTokenizer
from potstill.decode.generate import GenerationOptions, generate_texts
from potstill.decode.stop_tokens import find_template_ends, list_stop_tokens
from potstill.models.edits import Edit, TokenText, find_trigger
from potstill.models.feed_forward import find_down_projections, read_activations
from potstill.models.load import LoadedModel
from potstill.models.tokenizers.token_bytes import read_token_bytes
from potstill.stages.edit_options import RANDOM, SHARED, EditOptions
from potstill.transforms.fact_edit import EditText, FactEditConfig, LearnedEdit, learn_edit
from potstill.transforms.neurons import (
    Neurons,
    choose_random,
    choose_strongest,
    find_shared_neurons,
    list_fallback_layers,
    score_neurons,
)

REQUEST = "Write this question in other words, in its own language. Answer with the question alone.\n\n{}"
RAW_REQUEST = "{}\nThe same question in other words:"
MAX_PARAPHRASE_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class EditedFact:
    """A fact's edit, how it was learned, and the layers where no neuron is shared by all languages."""

    edit: Edit
    learned: LearnedEdit
    fallback_layers: Sequence[int]

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the edit, for the card."""
        return {
            "triggers": list(self.edit.triggers),
            "neurons": {layer: len(delta.neurons) for layer, delta in self.learned.deltas.items()},
            "fallback_layers": list(self.fallback_layers),
            "steps": self.learned.steps,
            "nll_before": self.learned.before,
            "nll_after": self.learned.after,
            "is_greedy": self.learned.is_greedy,
        }


@dataclass(kw_only=True)
class FactEditor:
    """Makes edits of facts for a loaded model, under the options of `edit`."""

    loaded: LoadedModel
    options: EditOptions
    counts: dict[str, int] = field(default_factory=lambda: {"paraphrases": 0, "paraphrases_left_out": 0})

    def __post_init__(self) -> None:
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        self.prompts = PromptTokenizer(tokenizer, special_in_text=self.options.special_in_text)
        self.token_bytes = read_token_bytes(tokenizer)
        self.is_chat = self.prompts.template is not None and not self.options.raw
        ends = [*(find_template_ends(tokenizer) if self.is_chat else []), *list_stop_tokens(model, tokenizer)]
        self.end = ends[:1]
        self.layers = parse_layers(self.options.layers, len(find_down_projections(model)))

    def encode(self, prompt: str) -> list[int]:
        """The token ids of a question up to its answer. Raises: DataError for control tokens that are refused."""
        if self.is_chat:
            return self.prompts.encode([{"role": "user", "content": prompt}])
        return self.prompts.encode_text(prompt)

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text by itself."""
        return list(self.loaded.tokenizer(text, add_special_tokens=False).input_ids)

    def encode_target(self, text: FactText) -> EditText:
        """A question with its target and the token that ends it. Raises: DataError for a target without a token."""
        ids = self.encode(text.prompt)
        target = self.tokenize(text.target if self.is_chat else f" {text.target}")
        if not target:
            raise DataError(f"the target {text.target!r} has no token; give an answer of at least one word")
        position = self._find_position(ids, get_trigger(text), text.prompt)
        return EditText([*ids, *target, *self.end], position, len(ids))

    def encode_neutral(self, subject: str) -> EditText:
        """A prompt that holds a subject alone, without a target."""
        ids = self.encode(subject)
        return EditText(ids, self._find_position(ids, subject), len(ids))

    def check_triggers(self, facts: Sequence[Fact], edits: Sequence[Edit] = ()) -> None:
        """Refuse a trigger, also of earlier `edits`, that stands in the chat template's own text.

        Every prompt would be edited.

        Raises: DataError.
        """
        if not self.is_chat:
            return
        template_text = TokenText(self.encode(""), self.token_bytes)
        triggers = [get_trigger(text) for fact in facts for text in fact.values()]
        triggers += [trigger for edit in edits for trigger in edit.triggers]
        for trigger in triggers:
            if template_text.find(trigger) is not None:
                raise DataError(
                    f"the chat template itself holds {trigger!r}, so an edit of it would act on every prompt; name the "
                    f"subject more fully, or give --similarity 0.5"
                )

    def write_paraphrases(self, facts: Sequence[Fact]) -> list[dict[str, tuple[str, ...]]]:
        """The paraphrases of each fact by language: those that it brings, else what the model writes of the question.

        A paraphrase that lacks the subject of its question is left out and counted.
        """
        texts = [(fact, language) for fact in facts for language in fact if not fact[language].paraphrases]
        requests = [
            self.encode((REQUEST if self.is_chat else RAW_REQUEST).format(fact[language].prompt))
            for fact, language in texts
            for _ in range(self.options.paraphrases)
        ]
        generation = GenerationOptions(
            max_new_tokens=MAX_PARAPHRASE_TOKENS, temperature=1.0, seed=self.options.seed, batch_size=8
        )
        answers = iter(generate_texts(self.loaded.model, self.loaded.tokenizer, requests, options=generation))
        return [
            {
                language: text.paraphrases
                or self._select_paraphrases([next(answers) for _ in range(self.options.paraphrases)], text)
                for language, text in fact.items()
            }
            for fact in facts
        ]

    def edit(self, fact: Fact, paraphrases: Mapping[str, Sequence[str]], *, seed: int) -> EditedFact:
        """The edit of one fact. Raises: UnsupportedModel without gated feed-forwards; DataError for an empty target."""
        triggers = {language: get_trigger(text) for language, text in fact.items()}
        activations = {
            language: read_activations(
                self.loaded.model,
                [
                    self._encode_to_trigger(prompt, triggers[language])
                    for prompt in (text.prompt, *paraphrases[language])
                ],
            )
            for language, text in fact.items()
        }
        scores = {language: score_neurons(values) for language, values in activations.items()}
        learned = learn_edit(
            self.loaded.model,
            {language: self.encode_target(text) for language, text in fact.items()},
            [self.encode_neutral(text.subject) for text in fact.values() if text.names_subject],
            self._choose_neurons(scores, seed=seed),
            torch.stack([values[0].norm(dim=1) for values in activations.values()]).mean(0),
            self.config,
        )
        edit = Edit(
            triggers=tuple(dict.fromkeys(triggers.values())),
            prompts=tuple(dict.fromkeys(text.prompt for text in fact.values())),
            deltas=learned.deltas,
        )
        fallback = [layer for layer in list_fallback_layers(scores, top=self.options.top) if layer in self.layers]
        return EditedFact(edit=edit, learned=learned, fallback_layers=fallback)

    @property
    def config(self) -> FactEditConfig:
        """How an edit is learned."""
        return FactEditConfig(
            steps=self.options.steps,
            learning_rate=self.options.lr,
            clamp=self.options.clamp,
            neutral_weight=self.options.neutral_weight,
        )

    def _choose_neurons(self, scores: Mapping[str, Tensor], *, seed: int) -> Neurons:
        """The neurons of the layers that are edited, by `--neurons`."""
        common = {
            layer: ids
            for layer, ids in find_shared_neurons(scores, top=self.options.top).items()
            if layer in self.layers
        }
        counts = {layer: len(ids) for layer, ids in common.items()}
        if self.options.neurons == SHARED:
            return common
        if self.options.neurons == RANDOM:
            return choose_random(next(iter(scores.values())).shape[1], counts, seed=seed)
        return choose_strongest(scores[self.options.neurons], counts)

    def _select_paraphrases(self, answers: Sequence[str], text: FactText) -> tuple[str, ...]:
        """The first lines of answers that are paraphrases: new, and with the subject of the question."""
        lines = [clean_line(answer) for answer in answers]
        candidates = [line for line in dict.fromkeys(lines) if line and line != text.prompt]
        chosen = [line for line in candidates if not text.names_subject or find_trigger(line, text.subject)]
        self.counts["paraphrases"] += len(chosen)
        self.counts["paraphrases_left_out"] += len(answers) - len(chosen)
        return tuple(chosen)

    def _encode_to_trigger(self, prompt: str, trigger: str) -> list[int]:
        """The ids of a prompt up to the last token of its trigger, or of the prompt itself."""
        ids = self.encode(prompt)
        return ids[: self._find_position(ids, trigger, prompt) + 1]

    def _find_position(self, ids: Sequence[int], *triggers: str) -> int:
        """The last token of the first of `triggers` that the ids hold, or else of the ids."""
        text = TokenText(ids, self.token_bytes)
        spans = [span for trigger in triggers if (span := text.find(trigger)) is not None]
        return text.get_token(spans[0]) if spans else len(ids) - 1


def get_trigger(text: FactText) -> str:
    """What a prompt must contain: the subject, or the whole question where it does not name it."""
    return text.subject if text.names_subject else text.prompt


def check_neurons(neurons: str, facts: Sequence[Fact]) -> None:
    """Refuse neurons that are neither shared, nor random, nor those of a language of every fact. Raises: UsageError."""
    choices = (SHARED, RANDOM, *list_languages(facts))
    if neurons not in choices:
        raise UsageError(f"--neurons {neurons!r}{suggest(neurons, choices)} is none of {', '.join(choices)}")
    missing = [fact for fact in facts if neurons not in (SHARED, RANDOM, *fact)]
    if missing:
        prompt = next(iter(missing[0].values())).prompt
        raise UsageError(
            f"--neurons {neurons} needs every fact in {neurons}, and {len(missing):,} of {len(facts):,} lack it, such "
            f"as {prompt[:60]!r}; choose another language, shared or random"
        )


def clean_line(answer: str) -> str:
    """The first line of an answer, without quotes around it."""
    line = next(iter(answer.strip().splitlines()), "").strip()
    return line.strip("\"'“”«» ").strip()


def parse_layers(text: str, count: int) -> list[int]:
    """The layers that `8-15,20` names, counted from 0; all `count` layers for an empty text.

    Raises: UsageError for a text that names no layer, or one that the model has not.
    """
    layers: set[int] = set()
    for piece in filter(None, text.split(",")):
        first, _, last = piece.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise UsageError(f"--layers {text!r} names no layers; write a list such as 8-15,20")
        if int(last or first) >= count:
            raise UsageError(f"--layers {text} names layer {last or first}; the model's layers are 0 to {count - 1}")
        layers.update(range(int(first), int(last or first) + 1))
    return sorted(layers) or list(range(count))
