"""Which tokens end an answer of a model."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_stop_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> set[int]:
    """The ids with which an answer may end: end of text, those of the model's generation, and other special tokens."""
    eos_token_id = getattr(model.generation_config, "eos_token_id", None)
    eos_ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    special_ids = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    return {i for i in (*eos_ids, *special_ids, *tokenizer.all_special_ids) if i is not None}
