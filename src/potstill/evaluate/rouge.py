"""ROUGE-L of greedy answers to prompts (arXiv: Lin, 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

    F1 = 2 P R / (P + R),   P = LCS(answer, reference) / |answer|,   R = LCS(answer, reference) / |reference|

over stemmed English words, times 100, the best over an example's references. Departs from nothing in `rouge_score`.
Only [a-z0-9] count as words there, so ROUGE-L says nothing about answers in other scripts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import DataError
from potstill.data.chat import as_messages
from potstill.data.corpus import Corpus
from potstill.data.template import ChatTemplate
from potstill.evaluate.reading import at_rest, context_of


class Question(NamedTuple):
    """The token ids of a rendered prompt and the answers that count as right."""

    prompt: Sequence[int]
    references: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How answers are written: greedily at temperature 0, else sampled with `seed`."""

    max_new_tokens: int = 128
    batch: int = 8
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answers:
    """What was written for each question, and its ROUGE-L F1 times 100."""

    texts: Sequence[str]
    rouge_l: Float[np.ndarray, " n"]


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`prompt` as the model expects it: through its chat template where it has one, else as plain text."""
    if not tokenizer.chat_template:
        return list(tokenizer(prompt).input_ids)
    rendered = ChatTemplate(tokenizer).render([{"role": "user", "content": prompt}], prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False).input_ids)


def questions(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None) -> list[Question]:
    """The first `limit` pairs of a corpus, or its chats with their last answer asked for.

    Raises: DataError where the corpus is plain text, which asks nothing.
    """
    if corpus.kind == "text":
        raise DataError(f"{corpus.name} is plain text; ROUGE-L needs prompts with responses, or chats")
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    asked = (question_of(document, tokenizer, template) for document in corpus.documents)
    return list(islice((question for question in asked if question is not None), limit))


def question_of(
    document: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None
) -> Question | None:
    """What a pair or a chat asks for, line by line without a template; None for a chat in which nobody answers."""
    messages = as_messages(document)
    answered = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answered:
        return None
    before, answer = messages[: answered[-1]], messages[answered[-1]]["content"]
    if template is None:
        asked = "".join(message["content"] + "\n" for message in before)
        return Question(list(tokenizer(asked).input_ids), [answer])
    rendered = template.render(before, prompt=True)
    return Question(list(tokenizer(rendered, add_special_tokens=False).input_ids), [answer])


def judge_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    limit: int | None = None,
    writing: Writing | None = None,
) -> Answers:
    """Let `model` answer the first `limit` questions that its context has room for, and compare with their references.

    Raises: DataError where it has room for none.
    """
    room = context_of(model) - (writing or Writing()).max_new_tokens
    asked = [question for question in questions if len(question.prompt) <= room][:limit]
    if questions and not asked:
        raise DataError(f"all {len(questions)} prompts are longer than the {room} tokens that the model has room for")
    texts = write(model, tokenizer, [question.prompt for question in asked], writing=writing)
    return Answers(texts, rouge_l(texts, [question.references for question in asked]))


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " n"]:
    """ROUGE-L F1 times 100 of each text against the best of its references."""
    from rouge_score.rouge_scorer import RougeScorer  # takes a second to import

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(texts, references, strict=True)
    best = [max(scorer.score(right, text)["rougeL"].fmeasure for right in rights) for text, rights in pairs]
    return 100.0 * np.array(best, dtype=np.float64)


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    writing: Writing | None = None,
) -> list[str]:
    """What `model` writes after each prompt, without the prompt and without special tokens."""
    writing = writing or Writing()
    by_length = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))  # so that batches hold little padding
    texts = [""] * len(prompts)
    with at_rest(model), torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(writing.seed)
        for first in range(0, len(prompts), writing.batch):
            chosen = by_length[first : first + writing.batch]
            written = _write(model, tokenizer, [prompts[n] for n in chosen], writing)
            for number, text in zip(chosen, written, strict=True):
                texts[number] = text
    return texts


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], writing: Writing
) -> list[str]:
    stop = model.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if stop is None else stop
    filler = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    sampled: dict[str, Any] = {"temperature": writing.temperature, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=writing.max_new_tokens,
        do_sample=writing.temperature > 0,
        eos_token_id=stop,
        pad_token_id=filler,
        **(sampled if writing.temperature > 0 else {}),
    )
    ids, mask = pad_left(prompts, filler)
    written = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config)
    decoded: list[str] = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    return decoded


def pad_left(prompts: Sequence[Sequence[int]], filler: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """(ids, mask) of `prompts` with `filler` before the shorter ones, so that all end where writing begins."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[filler] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []
