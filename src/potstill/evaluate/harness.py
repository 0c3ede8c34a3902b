"""Tasks of EleutherAI's lm-evaluation-harness, run on a loaded model, as measures (extra `eval`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import DataError, MissingDependency, NotFound
from potstill.core.types import Measure
from potstill.evaluate.perplexity import bos_of
from potstill.evaluate.reading import at_rest


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    few_shot: int | None = None,
    limit: int | None = None,
    batch: int = 8,
) -> list[Measure]:
    """The results of `tasks`, each with its version in the note; BOS is added as the model's tokenizer does.

    Raises: MissingDependency without the extra `eval`; NotFound for a task that the harness does not know.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependency("lm-eval tasks need the extra `eval`; run: pip install 'potstill[eval]'") from error
    known = TaskManager()
    if unknown := [task for task in tasks if not known.match_tasks([task])]:
        raise NotFound(f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists those that it knows")
    adds_bos = bos_of(tokenizer) is not None  # a wrong BOS alone has cost published scores tens of points
    with at_rest(model):
        judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, add_bos_token=adds_bos)
        results = simple_evaluate(
            model=judged,
            tasks=list(tasks),
            num_fewshot=few_shot,
            limit=limit,
            log_samples=False,
            task_manager=known,
        )
    if not results:
        raise DataError(f"lm-eval gave no results for {', '.join(tasks)}")
    return measures_of(results)


def measures_of(results: Mapping[str, Any]) -> list[Measure]:
    """The harness's result document as measures called `task/metric`, with 95 % intervals from its standard errors."""
    return [
        _measure(results, task, key, float(value))
        for task, found in sorted(results["results"].items())
        for key, value in sorted(found.items())
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    ]


def _measure(results: Mapping[str, Any], task: str, key: str, value: float) -> Measure:
    metric, filtered = key.split(",", 1)
    error = results["results"][task].get(f"{metric}_stderr,{filtered}")
    half = 1.96 * error if isinstance(error, int | float) else None
    higher = results.get("higher_is_better", {}).get(task, {}).get(metric, True)
    shots = results.get("n-shot", {}).get(task, 0)
    version = results.get("versions", {}).get(task, "unknown")
    return Measure(
        f"{task}/{metric}" if filtered == "none" else f"{task}/{metric}/{filtered}",
        value,
        "score",
        int(results.get("n-samples", {}).get(task, {}).get("effective", 0)),
        better="higher" if higher else "lower",
        low=None if half is None else value - half,
        high=None if half is None else value + half,
        note=f"lm-eval task version {version}, {shots}-shot",
    )
