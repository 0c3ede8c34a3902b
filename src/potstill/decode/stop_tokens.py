"""The tokens that end what a model writes: one rule for rollouts, samples, ROUGE, the server and the checks."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import UsageError


def find_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end an answer: `eos_token_id` of the generation config (one or a list), and the tokenizer's.

    The union is taken because either alone misses an end in use. Chat models list the end of a turn in the generation
    config only (Llama 3: `<|eot_id|>`). A pruned or retrained model may carry a generation config that names another
    token than its tokenizer, whose end-of-text token closes every document of the training data.
    Other special tokens (padding, start of text, unknown) end nothing: no decoder stops at them.
    """
    eos_token_id = getattr(model.generation_config, "eos_token_id", None)
    eos_token_ids = eos_token_id if isinstance(eos_token_id, Sequence) else [eos_token_id]
    return frozenset(int(token) for token in (*eos_token_ids, tokenizer.eos_token_id) if token is not None)


def require_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The stop tokens, where text without an end is of no use.

    Raises: UsageError where there is no stop token.
    """
    stop_tokens = find_stop_tokens(model, tokenizer)
    if not stop_tokens:
        raise UsageError(
            "neither the model's generation config nor its tokenizer names a token that ends a text, so no answer "
            "would ever end; set eos_token_id in one of them"
        )
    return stop_tokens
