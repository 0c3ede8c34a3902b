"""The prompts of a data set: of pairs and chats what stands before an answer, of plain texts their beginnings."""

from collections.abc import Iterator
from itertools import islice

from transformers import PreTrainedTokenizerBase

from potstill.core.errors import DataError
from potstill.data.corpus import Corpus
from potstill.data.prompts import PromptTokenizer
from potstill.evaluate.rouge import Question, find_question

MAX_TEXT_TOKENS = 128  # of a plain text; of a short one its first half


def build_prompts(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int,
    max_tokens: int,
    special_in_text: str = "keep",
    on_bad_row: str = "skip",
) -> list[list[int]]:
    """The token ids of the first `limit` prompts that have at most `max_tokens` tokens.

    Raises: DataError if there are none, and for what `special_in_text` and `on_bad_row` refuse.
    """
    prompt_tokenizer = PromptTokenizer(tokenizer, special_in_text=special_in_text)
    num_long = 0

    def iterate_prompts() -> Iterator[list[int]]:
        nonlocal num_long
        for document in corpus.documents:
            if corpus.kind == "text":
                ids = cut_text(prompt_tokenizer.encode_text(document["text"]))
            else:
                question = find_question(document, prompt_tokenizer, on_bad_row=on_bad_row)
                ids = list(question.prompt) if isinstance(question, Question) else []
            num_long += len(ids) > max_tokens
            if 0 < len(ids) <= max_tokens:
                yield ids

    prompts = list(islice(iterate_prompts(), limit))
    if not prompts and num_long:
        raise DataError(
            f"all {num_long} prompts of {corpus.name} are longer than the {max_tokens} tokens that the context leaves; "
            f"give shorter ones, or lower --max-tokens"
        )
    if not prompts:
        raise DataError(f"{corpus.name} has no prompt; give pairs, chats that end with an answer, or texts")
    return prompts


def cut_text(ids: list[int]) -> list[int]:
    """The first half of a text, at most `MAX_TEXT_TOKENS` tokens of it."""
    return ids[: min(MAX_TEXT_TOKENS, (len(ids) + 1) // 2)]
