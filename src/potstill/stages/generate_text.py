"""Writes a model's answer to one prompt."""

from typing import Any

from potstill.core.device import resolve_device
from potstill.core.errors import DataError, UsageError
from potstill.decode.generate import GenerationOptions, generate_texts
from potstill.evaluate.samples import tokenize_prompt
from potstill.models.inference import get_max_context
from potstill.models.load import load_model


def generate_text(
    model: str,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    raw: bool,
    device: str,
    seed: int,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The answer of `model` to `prompt`; with `raw` it continues the prompt without a chat template.

    Raises: DataError if the prompt has no token; UsageError if prompt and answer exceed the model's context.
    """
    loaded = load_model(
        model, device=resolve_device(device), allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    )
    ids = loaded.tokenizer(prompt).input_ids if raw else tokenize_prompt(prompt, loaded.tokenizer)
    if not prompt or not ids:
        raise DataError("the prompt has no token; write at least one word")
    if len(ids) + max_tokens > get_max_context(loaded.model):
        raise UsageError(
            f"{len(ids)} tokens of prompt and {max_tokens} of answer exceed the {get_max_context(loaded.model)} tokens "
            f"of context of {model}; shorten the prompt or lower --max-tokens"
        )
    generation_options = GenerationOptions(max_new_tokens=max_tokens, temperature=temperature, seed=seed)
    text = generate_texts(loaded.model, loaded.tokenizer, [ids], options=generation_options)[0]
    return {"model": model, "prompt": prompt, "text": text, "prompt_tokens": len(ids)}
