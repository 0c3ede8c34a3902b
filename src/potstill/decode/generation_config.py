"""The generation config that comes with a model: which of its sampling defaults are used, and how to measure without.

Hugging Face's `generate` fills every setting that a caller leaves open from `model.generation_config`, also in greedy
decoding: a `repetition_penalty` of 1.1 (Qwen2.5) then changes the argmax. `plain_generation_config` hides these
settings from code that calls `generate`. potstill's own loop (`decode.generate`) reads only the stop tokens of a model.
`potstill generate` and `potstill serve` take `SAMPLING_DEFAULTS` from the model where they sample, as vLLM does.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from transformers import GenerationConfig, PreTrainedModel

from potstill.decode.sampling import SamplingFilters

log = logging.getLogger("potstill")

# The settings that are used, each with the value that changes nothing, as of vLLM.
SAMPLING_DEFAULTS: Mapping[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
# Other settings that change what Hugging Face writes; potstill never uses them.
UNUSED_SETTINGS = (
    *("num_beams", "num_beam_groups", "penalty_alpha", "typical_p", "epsilon_cutoff", "eta_cutoff", "guidance_scale"),
    *("encoder_repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens"),
    *("bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens"),
    *("exponential_decay_length_penalty", "length_penalty", "watermarking_config"),
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def read_sampling_defaults(model: PreTrainedModel) -> dict[str, float]:
    """The `SAMPLING_DEFAULTS` that the model's generation config sets to a value that changes something."""
    values = {name: getattr(model.generation_config, name, None) for name in SAMPLING_DEFAULTS}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and value != SAMPLING_DEFAULTS[name] and value >= 0
    }


def list_unused_settings(model: PreTrainedModel) -> list[str]:
    """The names of `UNUSED_SETTINGS` that the model's generation config sets."""
    plain = GenerationConfig()
    values = {name: getattr(model.generation_config, name, None) for name in UNUSED_SETTINGS}
    return [
        name
        for name, value in values.items()
        if value not in (None, [], 0, 1, 1.0) and value != getattr(plain, name, None)
    ]


def make_filters(values: Mapping[str, float]) -> SamplingFilters:
    """The filters of sampling settings; a temperature among them is none."""
    return SamplingFilters(
        top_k=int(values.get("top_k", 0)),
        top_p=float(values.get("top_p", 1.0)),
        min_p=float(values.get("min_p", 0.0)),
        repetition_penalty=float(values.get("repetition_penalty", 1.0)),
    )


def describe_settings(values: Mapping[str, float]) -> str:
    """`temperature 0.7, top_p 0.8`."""
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def log_unused_settings(model: PreTrainedModel, name: str) -> None:
    """Name the settings of the model `name` that Hugging Face's `generate` would use, and potstill does not."""
    if unused := list_unused_settings(model):
        log.warning("note: potstill does not use %s of the generation config of %s", ", ".join(unused), name)


@contextmanager
def plain_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Hide the settings of the model's generation config, except its token ids, from code that calls `generate`."""
    original = model.generation_config
    ids = {name: getattr(original, name, None) for name in TOKEN_IDS}
    model.generation_config = GenerationConfig(**{name: value for name, value in ids.items() if value is not None})
    try:
        yield
    finally:
        model.generation_config = original
