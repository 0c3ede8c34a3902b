"""The tokens that end what a model writes: one rule for rollouts, samples, ROUGE, the server, checks and saving."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import DataError, UsageError
from potstill.models.tokenizers.chat_renderer import ChatRenderer


def list_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer, in this order: `eos_token_id` of the generation config (one or a list), the
    tokenizer's, and those with which the chat template ends an answer or a tool call.

    The union is taken because each alone misses an end in use. Chat models list the end of a turn in the generation
    config only (Llama 3: `<|eot_id|>`). A base model that is trained on chats learns the end of a turn from its
    template alone. A pruned or retrained model may carry a generation config that names another token than its
    tokenizer, whose end-of-text token closes every document of the training data.
    Other special tokens (padding, start of text, unknown) end nothing: no decoder stops at them.
    """
    eos_token_id = getattr(model.generation_config, "eos_token_id", None)
    eos_token_ids = eos_token_id if isinstance(eos_token_id, Sequence) else [eos_token_id]
    ids = (*eos_token_ids, tokenizer.eos_token_id, *find_template_ends(tokenizer))
    return list(dict.fromkeys(int(token) for token in ids if token is not None))


def find_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end an answer, as a set (`list_stop_tokens`)."""
    return frozenset(list_stop_tokens(model, tokenizer))


def find_template_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with which the chat template ends an answer; empty without a template, or if it writes no answers."""
    if not tokenizer.chat_template:
        return []
    try:
        return ChatRenderer(tokenizer).end_tokens
    except DataError:
        return []


def require_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The stop tokens, where text without an end is of no use.

    Raises: UsageError where there is no stop token.
    """
    stop_tokens = find_stop_tokens(model, tokenizer)
    if not stop_tokens:
        raise UsageError(
            "neither the model's generation config nor its tokenizer or chat template names a token that ends a text, "
            "so no answer would ever end; set eos_token_id in one of them"
        )
    return stop_tokens
