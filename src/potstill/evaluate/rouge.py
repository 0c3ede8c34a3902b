"""ROUGE-L of greedy answers to prompts (Lin, 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

    F1 = 2 P R / (P + R),   P = LCS(answer, reference) / |answer|,   R = LCS(answer, reference) / |reference|

over stemmed English words, times 100, with the best of an example's references. Computed by the package `rouge_score`,
whose words consist of [a-z0-9] only: ROUGE-L is meaningless for answers in other scripts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import DataError
from potstill.data.corpus import Corpus
from potstill.data.prompts import PromptTokenizer
from potstill.data.tokenize import TEMPLATE_REFUSAL
from potstill.data.turns import get_tools, is_trained, to_messages
from potstill.decode.generate import GenerationOptions, generate_texts
from potstill.models.inference import get_max_context

NO_QUESTION = "no prompt"  # why a document is left out


class Question(NamedTuple):
    """The token ids of a rendered prompt, and the reference answers."""

    prompt: Sequence[int]
    references: Sequence[str]


@dataclass(frozen=True)
class ScoredAnswers:
    """The model's answer to each question, and its ROUGE-L F1 times 100."""

    texts: Sequence[str]
    rouge_l: Float[np.ndarray, " n"]


def build_questions(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    special_in_text: str = "keep",
) -> list[Question]:
    """The first `limit` questions of a corpus: prompts with responses, or chats up to their last answer.

    Left out are answers without a text of their own, such as tool calls, chats that the template refuses, and prompts
    with control tokens that `special_in_text` refuses.

    Raises: DataError if the corpus is plain text, which has no prompts.
    """
    if corpus.kind == "text":
        raise DataError(f"{corpus.name} is plain text; ROUGE-L needs prompts with responses, or chats")
    prompts = PromptTokenizer(tokenizer, special_in_text=special_in_text)
    candidates = (find_question(document, prompts) for document in corpus.documents)
    questions = (
        question
        for question in candidates
        if isinstance(question, Question) and any(map(str.strip, question.references))
    )
    return list(islice(questions, limit))


def find_question(document: Mapping[str, Any], prompts: PromptTokenizer, *, on_bad_row: str = "skip") -> Question | str:
    """The question of a document, or the reason why it is left out.

    Raises: DataError with `on_bad_row="refuse"`, if the chat is refused.
    """
    try:
        return build_question(document, prompts) or NO_QUESTION
    except DataError as error:
        if on_bad_row == "refuse":
            raise DataError(f"{error}; leave such chats out with --on-bad-row skip") from error
        return TEMPLATE_REFUSAL


def build_question(document: Mapping[str, Any], prompts: PromptTokenizer) -> Question | None:
    """The question of a document: all messages before its last answer that is trained on, which is the reference.

    A chat without an answer gives None.

    Raises: DataError if the template refuses the chat, or for control tokens that are refused.
    """
    messages = to_messages(document)
    assistant_indices = [i for i, message in enumerate(messages) if is_trained(message)]
    if not assistant_indices:
        return None
    context_messages, answer = messages[: assistant_indices[-1]], messages[assistant_indices[-1]]["content"]
    return Question(prompts.encode(context_messages, tools=get_tools(document)), [answer])


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    limit: int | None = None,
    options: GenerationOptions | None = None,
) -> ScoredAnswers:
    """The answers of `model` to the first `limit` questions that fit in its context, scored by their references.

    Raises: DataError if no question fits.
    """
    max_prompt_tokens = get_max_context(model) - (options or GenerationOptions()).max_new_tokens
    selected_questions = [question for question in questions if len(question.prompt) <= max_prompt_tokens][:limit]
    if questions and not selected_questions:
        raise DataError(
            f"all {len(questions)} prompts are longer than the {max_prompt_tokens} tokens that the context leaves"
        )
    texts = generate_texts(model, tokenizer, [question.prompt for question in selected_questions], options=options)
    return ScoredAnswers(texts, rouge_l(texts, [question.references for question in selected_questions]))


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " n"]:
    """The ROUGE-L F1 times 100 of each text, with the best of its references."""
    from rouge_score.rouge_scorer import RougeScorer  # a slow import

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(texts, references, strict=True)
    best = [
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in text_references)
        for text, text_references in pairs
    ]
    return 100.0 * np.array(best, dtype=np.float64)
