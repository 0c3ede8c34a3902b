"""Draws samples for questions, part by part, so that a stopped stage continues."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from potstill.core.errors import DataError
from potstill.data.prompts import PromptTokenizer
from potstill.decode.generate import generate_samples
from potstill.decode.sampling import Sampling, SamplingFilters
from potstill.decode.stop_tokens import require_stop_tokens
from potstill.models.inference import get_max_context, inference_context
from potstill.models.load import LoadedModel
from potstill.models.tokenizers.vocabulary import count_token_ids
from potstill.stages.candidates.options import CandidateOptions
from potstill.stages.candidates.questions import Question
from potstill.stages.dataset_parts import PROMPTS_PER_PART, cut_parts, load_part
from potstill.train.rollouts.base import make_generator


class Candidate(NamedTuple):
    """A sampled answer. `ended` is false where it was cut before a stop token."""

    text: str
    ended: bool


class CandidateSampler:
    """Samples of one model. What it draws for a question depends on the seed, the question and the sample alone.

    Finished parts are files of `folder`, in the order in which they are drawn.

    Raises: UnsupportedModel for a model whose answers do not end.
    """

    def __init__(self, loaded: LoadedModel, options: CandidateOptions, folder: Path) -> None:
        self.loaded, self.options, self.folder, self.num_parts = loaded, options, folder, 0
        self.prompts = PromptTokenizer(loaded.tokenizer, special_in_text=options.special_in_text)
        self.stop_tokens = require_stop_tokens(loaded.model, loaded.tokenizer)
        self.sampling = Sampling(
            vocabulary=count_token_ids(loaded.tokenizer),
            stop=self.stop_tokens,
            temperature=options.temperature,
            filters=SamplingFilters(top_p=options.top_p),
        )

    def draw(self, questions: Sequence[Question], count: int, *, first: int = 0) -> list[list[Candidate]]:
        """The samples `first` to `first + count` of each question; none where the prompt is too long or refused.

        Raises: DataError with `on_bad_row="refuse"`, for a prompt that the template refuses.
        """
        parts = cut_parts(questions, PROMPTS_PER_PART)
        return [candidates for part in parts for candidates in self._load_part(part, count, first)]

    def _load_part(self, questions: Sequence[Question], count: int, first: int) -> list[list[Candidate]]:
        """The samples of the next part, drawn unless its file exists."""
        file = self.folder / f"part-{self.num_parts:05}.jsonl"
        self.num_parts += 1
        lines = load_part(file, partial(self._sample, questions, count, first))
        return [[Candidate(*candidate) for candidate in line] for line in lines]

    def _sample(self, questions: Sequence[Question], count: int, first: int) -> list[list[Candidate]]:
        longest = get_max_context(self.loaded.model) - self.options.max_tokens
        prompts = [self._encode(question) for question in questions]
        order = sorted((n for n, ids in enumerate(prompts) if 0 < len(ids) <= longest), key=lambda n: len(prompts[n]))
        candidates: list[list[Candidate]] = [[] for _ in questions]
        for indices in cut_parts(order, self.options.batch):
            noise = torch.stack([self._draw_noise(questions[n], count, first) for n in indices])
            ids = [torch.tensor(prompts[n], device=self.loaded.model.device) for n in indices]
            with inference_context(self.loaded.model):
                groups = generate_samples(
                    self.loaded.model, ids, noise.to(ids[0].device), self.options.max_tokens, self.sampling
                )
            for n, samples in zip(indices, groups, strict=True):
                candidates[n] = [self._decode(sample.tokens) for sample in samples]
        return candidates

    def _encode(self, question: Question) -> list[int]:
        """The ids of a prompt; none where it is refused."""
        try:
            return self.prompts.encode(question.messages, tools=question.tools)
        except DataError:
            if self.options.on_bad_row == "refuse":
                raise
            return []

    def _draw_noise(self, question: Question, count: int, first: int) -> torch.Tensor:
        generator = make_generator(self.options.seed, question.number, 0)
        return torch.rand(first + count, self.options.max_tokens, generator=generator)[first:]

    def _decode(self, tokens: Sequence[int]) -> Candidate:
        text = self.loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        return Candidate(text, tokens[-1] in self.stop_tokens)
