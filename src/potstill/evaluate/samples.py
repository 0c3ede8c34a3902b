"""What several models write after the same prompts, side by side."""

from collections.abc import Mapping, Sequence

from potstill.evaluate.rouge import Writing, prompt_ids, write
from potstill.models.load import Loaded


def side_by_side(
    models: Mapping[str, Loaded], prompts: Sequence[str], *, writing: Writing | None = None
) -> list[dict[str, str | dict[str, str]]]:
    """For each prompt `{"prompt": ..., "answers": {model: text}}`; each model sees it through its own chat template."""
    texts = {
        name: write(loaded.model, loaded.tokenizer, [prompt_ids(p, loaded.tokenizer) for p in prompts], writing=writing)
        for name, loaded in models.items()
    }
    return [
        {"prompt": prompt, "answers": {name: written[number] for name, written in texts.items()}}
        for number, prompt in enumerate(prompts)
    ]


def to_markdown(samples: Sequence[Mapping[str, str | Mapping[str, str]]]) -> str:
    """`samples` as a Markdown table, one row a prompt and one column a model."""
    if not samples:
        return ""
    names = list(_answers(samples[0]))
    lines = [_line(["prompt", *names]), _line(["---"] * (1 + len(names)))]
    for sample in samples:
        answers = _answers(sample)
        lines.append(_line([_cell(str(sample["prompt"])), *(_cell(answers[name]) for name in names)]))
    return "\n".join(lines) + "\n"


def _answers(sample: Mapping[str, str | Mapping[str, str]]) -> Mapping[str, str]:
    answers = sample["answers"]
    assert not isinstance(answers, str)
    return answers


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """`text` so that it stays in its cell and is shown as written."""
    escaped = text.strip().replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    for mark in "|`*_[]#":
        escaped = escaped.replace(mark, "\\" + mark)
    return "<br>".join(escaped.splitlines()) or "(nothing)"
