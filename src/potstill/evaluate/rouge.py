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
from potstill.data.chat_template import ChatTemplate
from potstill.data.corpus import Corpus
from potstill.data.tokenize import to_messages
from potstill.evaluate.scoring_windows import get_max_context, inference_context


class Question(NamedTuple):
    """The token ids of a rendered prompt and the answers that count as right."""

    prompt: Sequence[int]
    references: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How answers are written: greedily at temperature 0, else sampled with `seed`."""

    max_new_tokens: int = 128
    batch_size: int = 8
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class ScoredAnswers:
    """What was written for each question, and its ROUGE-L F1 times 100."""

    texts: Sequence[str]
    rouge_l: Float[np.ndarray, " n"]


def tokenize_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`prompt` as the model expects it: through its chat template where it has one, else as plain text."""
    if not tokenizer.chat_template:
        return list(tokenizer(prompt).input_ids)
    prompt_text = ChatTemplate(tokenizer).render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    return list(tokenizer(prompt_text, add_special_tokens=False).input_ids)


def build_questions(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None) -> list[Question]:
    """The first `limit` pairs of a corpus, or its chats with their last answer asked for.

    Raises: DataError where the corpus is plain text, which asks nothing.
    """
    if corpus.kind == "text":
        raise DataError(f"{corpus.name} is plain text; ROUGE-L needs prompts with responses, or chats")
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    candidates = (build_question(document, tokenizer, template) for document in corpus.documents)
    return list(islice((question for question in candidates if question is not None), limit))


def build_question(
    document: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None
) -> Question | None:
    """What a pair or a chat asks for, line by line without a template; None for a chat in which nobody answers."""
    messages = to_messages(document)
    assistant_indices = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not assistant_indices:
        return None
    context_messages, answer = messages[: assistant_indices[-1]], messages[assistant_indices[-1]]["content"]
    if template is None:
        prompt_text = "".join(message["content"] + "\n" for message in context_messages)
        return Question(list(tokenizer(prompt_text).input_ids), [answer])
    chat_prompt = template.render(context_messages, add_generation_prompt=True)
    return Question(list(tokenizer(chat_prompt, add_special_tokens=False).input_ids), [answer])


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    limit: int | None = None,
    options: GenerationOptions | None = None,
) -> ScoredAnswers:
    """Let `model` answer the first `limit` questions that its context has room for, and compare with their references.

    Raises: DataError where it has room for none.
    """
    max_prompt_tokens = get_max_context(model) - (options or GenerationOptions()).max_new_tokens
    selected_questions = [question for question in questions if len(question.prompt) <= max_prompt_tokens][:limit]
    if questions and not selected_questions:
        raise DataError(
            f"all {len(questions)} prompts are longer than the {max_prompt_tokens} tokens that the model has room for"
        )
    texts = generate_texts(model, tokenizer, [question.prompt for question in selected_questions], options=options)
    return ScoredAnswers(texts, rouge_l(texts, [question.references for question in selected_questions]))


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " n"]:
    """ROUGE-L F1 times 100 of each text against the best of its references."""
    from rouge_score.rouge_scorer import RougeScorer  # takes a second to import

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(texts, references, strict=True)
    best = [
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in text_references)
        for text, text_references in pairs
    ]
    return 100.0 * np.array(best, dtype=np.float64)


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    options: GenerationOptions | None = None,
) -> list[str]:
    """What `model` writes after each prompt, without the prompt and without special tokens."""
    options = options or GenerationOptions()
    length_order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))  # so that batches hold little padding
    texts = [""] * len(prompts)
    with inference_context(model), torch.random.fork_rng(devices=_get_cuda_devices(model)):
        torch.manual_seed(options.seed)
        for start in range(0, len(prompts), options.batch_size):
            batch_indices = length_order[start : start + options.batch_size]
            batch_texts = _generate_batch(model, tokenizer, [prompts[n] for n in batch_indices], options)
            for index, text in zip(batch_indices, batch_texts, strict=True):
                texts[index] = text
    return texts


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
) -> list[str]:
    eos_token_id = model.generation_config.eos_token_id
    eos_token_id = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    pad_token_id = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    sampling_options: dict[str, Any] = {"temperature": options.temperature, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=options.temperature > 0,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        **(sampling_options if options.temperature > 0 else {}),
    )
    ids, mask = pad_left(prompts, pad_token_id)
    output_ids = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config)
    texts: list[str] = tokenizer.batch_decode(output_ids[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """(ids, mask) of `prompts` with `filler` before the shorter ones, so that all end where writing begins."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _get_cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []
