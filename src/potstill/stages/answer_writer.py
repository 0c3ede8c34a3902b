"""Writes a model's answers to many documents, in batches; each document has its own random numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from potstill.data.prompts import PromptTokenizer
from potstill.decode.generate import generate
from potstill.decode.sampling import Sampling
from potstill.decode.stop_tokens import require_stop_tokens
from potstill.evaluate.rouge import Question, find_question
from potstill.models.inference import get_max_context, inference_context
from potstill.models.load import LoadedModel
from potstill.models.tokenizers.vocabulary import count_token_ids
from potstill.stages.generate_options import GenerateDatasetOptions
from potstill.train.rollouts.base import make_generator

EMPTY_ANSWER, TRUNCATED_ANSWER, PROMPT_TOO_LONG = ("an empty answer", "an answer that did not end", "a prompt too long")

Line = dict[str, Any]  # of a part: a `document`, or why it is `left_out`


class Answer(NamedTuple):
    """The text of an answer, or the reason why there is none."""

    text: str
    lack: str = ""


class AnswerWriter:
    """A model on its device, with the sampling, the limits and the batch size of `options`.

    Raises: UnsupportedModel for a model whose answers do not end.
    """

    def __init__(self, loaded: LoadedModel, options: GenerateDatasetOptions) -> None:
        self.loaded, self.options = loaded, options
        self.stop_tokens = require_stop_tokens(loaded.model, loaded.tokenizer)
        self.max_prompt_tokens = get_max_context(loaded.model) - options.max_tokens
        self.sampling = Sampling(
            vocabulary=count_token_ids(loaded.tokenizer), stop=self.stop_tokens, temperature=options.temperature
        )

    def answer(self, documents: Mapping[int, Mapping[str, Any]], *, draw: int = 0) -> dict[int, Answer]:
        """The model's answer in place of the last one of each document, by the document's number.

        The seed, the number and `draw` determine the random numbers of an answer, whatever else is in its batch.

        Raises: DataError for a chat that the template refuses, if such rows are to be refused.
        """
        needs_template = any("messages" in document for document in documents.values())
        prompts = PromptTokenizer(
            self.loaded.tokenizer, special_in_text=self.options.special_in_text, needs_template=needs_template
        )
        questions = {
            number: find_question(document, prompts, on_bad_row=self.options.on_bad_row)
            for number, document in documents.items()
        }
        ids = {
            number: list(question.prompt)
            for number, question in questions.items()
            if isinstance(question, Question) and len(question.prompt) <= self.max_prompt_tokens
        }
        completions: dict[int, list[int]] = {}
        by_length = sorted(ids, key=lambda number: len(ids[number]))
        for start in range(0, len(by_length), self.options.batch):
            numbers = by_length[start : start + self.options.batch]
            written = self._generate([ids[number] for number in numbers], numbers, draw)
            completions |= zip(numbers, written, strict=True)
        return {
            number: Answer("", question) if isinstance(question, str) else self._decode(completions.get(number))
            for number, question in questions.items()
        }

    def _generate(self, prompts: Sequence[list[int]], numbers: Sequence[int], draw: int) -> list[list[int]]:
        device, max_tokens = self.loaded.model.device, self.options.max_tokens
        noise = [torch.rand(max_tokens, generator=make_generator(self.options.seed, n, draw)) for n in numbers]
        ids = [torch.tensor(prompt, device=device) for prompt in prompts]
        limits = [max_tokens] * len(ids)
        with inference_context(self.loaded.model):
            return generate([(1.0, self.loaded.model)], ids, torch.stack(noise).to(device), limits, self.sampling)

    def _decode(self, tokens: Sequence[int] | None) -> Answer:
        if tokens is None:
            return Answer("", PROMPT_TOO_LONG)
        if tokens[-1] not in self.stop_tokens:
            return Answer("", TRUNCATED_ANSWER)
        text = self.loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(text) if text.strip() else Answer("", EMPTY_ANSWER)
