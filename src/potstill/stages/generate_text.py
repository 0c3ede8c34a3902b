"""Writes a model's answer to one prompt."""

from typing import Any

from potstill.core.device import resolve_device
from potstill.core.errors import DataError, UsageError
from potstill.decode.generate import GenerationOptions, generate_texts
from potstill.decode.generation_config import (
    describe_settings,
    log_unused_settings,
    make_filters,
    read_sampling_defaults,
)
from potstill.decode.sampling import SamplingFilters
from potstill.evaluate.samples import tokenize_prompt
from potstill.models.inference import get_max_context
from potstill.models.load import LoadedModel, load_model
from potstill.stages.console import print_note
from potstill.stages.options import TextOptions
from potstill.stages.preflight import StageInputs
from potstill.stages.text_options import prepare_tokenizer

# the options of `generate` that an answer to one prompt takes
PROMPT_OPTIONS = ("max_tokens", "temperature", "device", "seed", "chat_template", "allow_pickle", "trust_remote_code")


def generate_text(
    model: str,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    raw: bool,
    device: str,
    seed: int,
    ignore_generation_config: bool = False,
    chat_template: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The answer of `model` to `prompt`; with `raw` it continues the prompt without a chat template.

    `chat_template` is a Jinja file to use instead of the model's template.

    A temperature of 0 is the argmax. Above 0 the other sampling defaults of the model's generation config act, unless
    `ignore_generation_config`; a note on stderr names them.

    Raises: DataError if the prompt has no token; UsageError if prompt and answer exceed the model's context; NotFound,
    UsageError for a chat template that is no file or no template.
    """
    text_options = TextOptions(chat_template=chat_template)
    StageInputs(models=(model,)).check()
    loaded = load_model(
        model, device=resolve_device(device), allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    )
    prepare_tokenizer(loaded.tokenizer, text_options)
    ids = loaded.tokenizer(prompt).input_ids if raw else tokenize_prompt(prompt, loaded.tokenizer)
    if not prompt or not ids:
        raise DataError("the prompt has no token; write at least one word")
    if len(ids) + max_tokens > get_max_context(loaded.model):
        raise UsageError(
            f"{len(ids)} tokens of prompt and {max_tokens} of answer exceed the {get_max_context(loaded.model)} tokens "
            f"of context of {model}; shorten the prompt or lower --max-tokens"
        )
    filters = SamplingFilters() if ignore_generation_config else choose_filters(loaded, temperature)
    generation_options = GenerationOptions(
        max_new_tokens=max_tokens, temperature=temperature, seed=seed, filters=filters
    )
    text = generate_texts(loaded.model, loaded.tokenizer, [ids], options=generation_options)[0]
    return {"model": model, "prompt": prompt, "text": text, "prompt_tokens": len(ids)}


def choose_filters(loaded: LoadedModel, temperature: float) -> SamplingFilters:
    """The filters of the model's generation config above temperature 0, named on stderr with what is not used."""
    defaults = read_sampling_defaults(loaded.model)
    log_unused_settings(loaded.model, loaded.name)
    if not defaults:
        return SamplingFilters()
    if temperature == 0:
        print_note(
            f"the answer is greedy; the generation config of {loaded.name} samples with {describe_settings(defaults)}: "
            f"pass --temperature {defaults.get('temperature', 1):g} for that"
        )
        return SamplingFilters()
    defaults.pop("temperature", None)
    filters = make_filters(defaults)
    if filters != SamplingFilters():
        print_note(
            f"sampling uses {describe_settings(defaults)} of the generation config of {loaded.name}; "
            f"--ignore-generation-config drops them"
        )
    return filters
