"""Applies the options of how text is read: the chat template, its date, what is trained, and what is left out."""

import datetime
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill.core.errors import DataError, UsageError
from potstill.data.control_tokens import check_control_token_policy
from potstill.data.row_reader import check_bad_row_policy
from potstill.data.tokenize import Rendering
from potstill.models.tokenizers.chat_renderer import ChatRenderer, fix_date, uses_date
from potstill.models.tokenizers.named_templates import NAMED_TEMPLATES
from potstill.stages.options import TextOptions

DATE_ORIGIN = "date"  # in a run's record and a cache's facts


def make_rendering(options: TextOptions) -> Rendering:
    """How documents become text under these options."""
    return Rendering(
        only_last=options.train_on == "last",
        special_in_text=check_control_token_policy(options.special_in_text),
        on_bad_row=check_bad_row_policy(options.on_bad_row),
    )


def get_text_options(options: TextOptions) -> dict[str, Any]:
    """The options of how text is read, by name, for another config that takes them."""
    return {field.name: getattr(options, field.name) for field in fields(TextOptions)}


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, options: TextOptions, *, origins: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Gives a tokenizer the template of --chat-template, and fixes the date that its template writes.

    The date is that of `origins`, which a resumed run or a cache recorded, or today. Returns it for the record of the
    run, under `date`; empty if the template writes no date.

    Raises: UsageError for a file that is no Jinja template.
    """
    set_chat_template(tokenizer, options.chat_template)
    if not uses_date(tokenizer):
        return {}
    recorded = (origins or {}).get(DATE_ORIGIN)
    date = datetime.date.fromisoformat(recorded) if recorded else datetime.date.today()
    fix_date(tokenizer, date)
    return {DATE_ORIGIN: date.isoformat()}


def set_chat_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> None:
    """Gives a tokenizer the template of --chat-template, a file or a name; without one nothing changes.

    Raises: UsageError for a file that is no Jinja template, or a template that the tokenizer cannot write.
    """
    if file is None:
        return
    tokenizer.chat_template = NAMED_TEMPLATES.get(file) or _read_template(Path(file).expanduser())
    try:
        ChatRenderer(tokenizer)
    except DataError as error:
        raise UsageError(f"--chat-template {file} cannot be used: {error}") from error


def _read_template(file: Path) -> str:
    """The text of a template file.

    Raises: UsageError if it is no UTF-8 text, or empty.
    """
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat-template {file} cannot be read as UTF-8 text ({error}); give a Jinja file") from error
    if not source.strip():
        raise UsageError(f"--chat-template {file} is empty; give a Jinja file")
    return source
