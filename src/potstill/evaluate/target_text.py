"""The text of a target itself: its greedy answers to the prompts of a data set, which a draft has to foresee."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from potstill.core.errors import DataError
from potstill.core.types import IGNORE
from potstill.data.corpus import Corpus
from potstill.data.prompts import PromptTokenizer
from potstill.decode.generate import generate
from potstill.decode.sampling import Sampling
from potstill.decode.stop_tokens import find_stop_tokens
from potstill.evaluate.rouge import build_questions
from potstill.evaluate.scoring_windows import Row
from potstill.models.inference import get_max_context
from potstill.models.load import LoadedModel

OPENING_TOKENS = 32  # of a plain text, which are its prompt


def list_prompts(
    corpus: Corpus, loaded: LoadedModel, *, limit: int, max_new_tokens: int, special_in_text: str = "keep"
) -> list[list[int]]:
    """The token ids of the first `limit` prompts that leave room for an answer; of a plain text its first tokens.

    Raises: DataError without such a prompt.
    """
    longest = get_max_context(loaded.model) - max_new_tokens
    prompts = (ids for ids in _iterate_prompts(corpus, loaded, special_in_text) if 1 < len(ids) <= longest)
    selected_prompts = list(islice(prompts, limit))
    if not selected_prompts:
        raise DataError(
            f"{corpus.name} has no prompt of at most {longest} tokens; give data with prompts, or lower --max-tokens"
        )
    return selected_prompts


def _iterate_prompts(corpus: Corpus, loaded: LoadedModel, special_in_text: str) -> Iterator[list[int]]:
    if corpus.kind != "text":
        questions = build_questions(corpus, loaded.tokenizer, special_in_text=special_in_text)
        yield from (list(question.prompt) for question in questions)
        return
    tokenizer = PromptTokenizer(loaded.tokenizer, special_in_text=special_in_text)
    for document in corpus.documents:
        yield tokenizer.encode_text(document["text"])[:OPENING_TOKENS]


@torch.no_grad()
def write_target_rows(loaded: LoadedModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Row]:
    """A row for each prompt: the prompt, then the target's greedy answer, which alone has labels.

    Answers of fewer than two tokens are left out, because drafts begin after the first.

    Raises: DataError if no answer is long enough.
    """
    device = loaded.model.device
    sampling = Sampling(
        vocabulary=loaded.vocabulary, stop=find_stop_tokens(loaded.model, loaded.tokenizer), temperature=0.0
    )
    answers = generate(
        [(1.0, loaded.model)],
        [torch.tensor(prompt, device=device) for prompt in prompts],
        torch.zeros(len(prompts), max_new_tokens),
        [max_new_tokens] * len(prompts),
        sampling,
    )
    rows = [
        Row([*prompt, *answer], [IGNORE] * len(prompt) + answer, 0)
        for prompt, answer in zip(prompts, answers, strict=True)
        if len(answer) > 1
    ]
    if not rows:
        raise DataError(f"{loaded.name} ends every answer at its first token; give other prompts")
    return rows
