"""Describes a data set: text, pairs and chats, or preferences."""

from functools import partial
from typing import Any

from potstill.core.errors import UsageError
from potstill.data.mixture import load_mixture
from potstill.data.preference_preview import describe_preferences
from potstill.data.preference_schema import recognize_any
from potstill.data.preview import describe
from potstill.stages.corpus import load_data
from potstill.stages.dataset import load_tokenizer
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.options import TextOptions
from potstill.stages.text_options import get_text_options, make_rendering, prepare_tokenizer


def describe_dataset(
    name: str,
    tokenizer: str,
    *,
    context: int,
    split: str,
    columns: str = "",
    options: TextOptions | None = None,
) -> dict[str, Any]:
    """What a data set holds and which of its tokens are trained, as `data.preview.describe` returns it.

    Preferences are described as `data.preference_preview` does it.

    Raises: NotFound, DataError; UsageError for a context below 2 tokens.
    """
    options = options or TextOptions()
    if context < 2:
        raise UsageError(f"--context {context} has no room for a token and what it is predicted from")
    config = DatasetConfig(**get_text_options(options), data=name, columns=columns, context=context)
    corpus = load_data(config, split=split, load=partial(load_mixture, recognize=recognize_any))
    loaded_tokenizer = load_tokenizer(tokenizer)
    prepare_tokenizer(loaded_tokenizer, options)
    describe_corpus = describe_preferences if corpus.kind == "preferences" else describe
    return describe_corpus(corpus, loaded_tokenizer, length=context, rendering=make_rendering(options))
