"""Runs tasks of EleutherAI's lm-evaluation-harness on a loaded model (extra `eval`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import DataError, MissingDependency, NotFound
from potstill.core.measure import Measure
from potstill.decode.generation_config import plain_generation_config
from potstill.evaluate.perplexity import get_bos_id
from potstill.models.inference import inference_context


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> list[Measure]:
    """The results of `tasks` as measures, with the task's version in the note; BOS is added as the tokenizer does.

    Tasks that generate use their own settings: the harness calls Hugging Face's `generate`, from which the model's
    generation config is hidden.

    Raises: MissingDependency without the extra `eval`; NotFound for an unknown task; DataError without results.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependency("lm-eval tasks need the extra `eval`; run: pip install 'potstill[eval]'") from error
    task_manager = TaskManager()
    if unknown_tasks := [task for task in tasks if not task_manager.match_tasks([task])]:
        raise NotFound(f"lm-eval has no task {', '.join(unknown_tasks)}; `lm-eval ls tasks` lists its tasks")
    adds_bos = get_bos_id(tokenizer) is not None  # a wrong BOS has changed published scores by tens of points
    with inference_context(model), plain_generation_config(model):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=adds_bos)
        results = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            task_manager=task_manager,
        )
    if not results:
        raise DataError(f"lm-eval gave no results for {', '.join(tasks)}")
    return parse_results(results)


def parse_results(results: Mapping[str, Any]) -> list[Measure]:
    """The harness's results as measures named `task/metric`, with 95 % intervals from its standard errors."""
    return [
        _build_measure(results, task, key, float(value))
        for task, metrics in sorted(results["results"].items())
        for key, value in sorted(metrics.items())
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    ]


def _build_measure(results: Mapping[str, Any], task: str, key: str, value: float) -> Measure:
    metric, filter_name = key.split(",", 1)
    error = results["results"][task].get(f"{metric}_stderr,{filter_name}")
    margin = 1.96 * error if isinstance(error, int | float) else None
    higher_is_better = results.get("higher_is_better", {}).get(task, {}).get(metric, True)
    num_fewshot = results.get("n-shot", {}).get(task, 0)
    version = results.get("versions", {}).get(task, "unknown")
    return Measure(
        f"{task}/{metric}" if filter_name == "none" else f"{task}/{metric}/{filter_name}",
        value,
        "score",
        int(results.get("n-samples", {}).get(task, {}).get("effective", 0)),
        better="higher" if higher_is_better else "lower",
        low=None if margin is None else value - margin,
        high=None if margin is None else value + margin,
        note=f"lm-eval task version {version}, {num_fewshot}-shot",
    )
