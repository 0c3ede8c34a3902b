"""What models write after a few prompts, for a card."""

from collections.abc import Collection, Mapping

from potstill.core.errors import DataError
from potstill.decode.generate import GenerationOptions
from potstill.evaluate.samples import format_markdown, generate_samples, tokenize_prompt
from potstill.models.inference import get_max_context
from potstill.models.load import LoadedModel

MAX_SAMPLE_TOKENS = 40
SAMPLE_PROMPTS = ("What is a pot still?", "Write one sentence about the sea.", "How do I read a file in Python?")


def write_samples(models: Mapping[str, LoadedModel]) -> str:
    """What the models write after `SAMPLE_PROMPTS`, as Markdown."""
    options = GenerationOptions(max_new_tokens=count_sample_tokens(models.values()))
    return format_markdown(generate_samples(models, SAMPLE_PROMPTS, options=options))


def count_sample_tokens(models: Collection[LoadedModel]) -> int:
    """The length of the samples: 40 tokens, or what every model's context leaves after the longest prompt.

    Raises: DataError where a template refuses the prompts, or a context leaves nothing.
    """
    room = min(
        get_max_context(model.model) - len(tokenize_prompt(prompt, model.tokenizer))
        for model in models
        for prompt in SAMPLE_PROMPTS
    )
    if room < 1:
        raise DataError(f"the prompts of the samples are {1 - room} tokens too long for the context of a model here")
    return min(MAX_SAMPLE_TOKENS, room)
