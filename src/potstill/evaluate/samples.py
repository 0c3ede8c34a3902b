"""Answers of several models to the same prompts, as a table."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from potstill.data.prompts import PromptTokenizer
from potstill.decode.generate import GenerationOptions, generate_texts
from potstill.models.load import LoadedModel


def tokenize_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, *, special_in_text: str = "keep") -> list[int]:
    """The token ids of `prompt`, rendered by the chat template where the tokenizer has one.

    Raises: DataError for control tokens that `special_in_text` refuses.
    """
    prompts = PromptTokenizer(tokenizer, special_in_text=special_in_text)
    return (
        prompts.encode_text(prompt)
        if prompts.template is None
        else prompts.encode([{"role": "user", "content": prompt}])
    )


def generate_samples(
    models: Mapping[str, LoadedModel], prompts: Sequence[str], *, options: GenerationOptions | None = None
) -> list[dict[str, str | dict[str, str]]]:
    """For each prompt `{"prompt": ..., "answers": {model: text}}`; each model's own chat template renders it."""
    texts = {
        name: generate_texts(
            loaded.model, loaded.tokenizer, [tokenize_prompt(p, loaded.tokenizer) for p in prompts], options=options
        )
        for name, loaded in models.items()
    }
    return [
        {"prompt": prompt, "answers": {name: model_texts[index] for name, model_texts in texts.items()}}
        for index, prompt in enumerate(prompts)
    ]


def format_markdown(samples: Sequence[Mapping[str, str | Mapping[str, str]]]) -> str:
    """`samples` as a Markdown table with a row for each prompt and a column for each model."""
    if not samples:
        return ""
    names = list(_get_answers(samples[0]))
    lines = [_format_row(["prompt", *names]), _format_row(["---"] * (1 + len(names)))]
    for sample in samples:
        answers = _get_answers(sample)
        lines.append(
            _format_row([_escape_cell(str(sample["prompt"])), *(_escape_cell(answers[name]) for name in names)])
        )
    return "\n".join(lines) + "\n"


def _get_answers(sample: Mapping[str, str | Mapping[str, str]]) -> Mapping[str, str]:
    answers = sample["answers"]
    assert not isinstance(answers, str)
    return answers


def _format_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape_cell(text: str) -> str:
    """`text` escaped so that Markdown shows it literally, in one cell."""
    escaped = text.strip().replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    for mark in "|`*_[]#":
        escaped = escaped.replace(mark, "\\" + mark)
    return "<br>".join(escaped.splitlines()) or "(nothing)"
