"""The advice from predicted and measured speed-ups, in one sentence and as data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from potstill.core.atomic_files import ADVICE_FILE
from potstill.decode.draft_length import interpolate
from potstill.evaluate.charts.speed_up import render_html
from potstill.evaluate.speculation.candidates import Setting
from potstill.evaluate.speculation.prediction import Evidence, Prediction
from potstill.evaluate.speculation.timing import MeasuredSpeed
from potstill.stages.public_names import get_public_name

PAGE_FILE = "speed-up.html"
MARGIN = 1.03  # the speed-up from which speculation is advised; below it, noise decides


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A setting with its predicted speed-up and, if it was measured, the true one.

    `is_smaller` is False where the draft has as many parameters as the target, or more.
    """

    setting: Setting
    prediction: Prediction
    measured: float | None = None
    is_smaller: bool = True

    @property
    def speed_up(self) -> float:
        """The measured speed-up, or else the predicted one."""
        return self.prediction.speed_up if self.measured is None else self.measured

    @property
    def error(self) -> float | None:
        """The relative error of the prediction."""
        return self.prediction.speed_up / self.measured - 1 if self.measured else None

    def to_dict(self) -> dict[str, Any]:
        """The trial as plain data."""
        prediction = self.prediction
        return {
            "draft": self.setting.draft,
            "draft_length": self.setting.length,
            "tree": self.setting.tree,
            "flags": self.setting.flags,
            "acceptance": list(prediction.acceptance),
            "tokens_per_pass": prediction.tokens_per_pass,
            "draft_cost": prediction.draft_cost,
            "verify_cost": prediction.verify_cost,
            "predicted": prediction.speed_up,
            "measured": self.measured,
            "error": self.error,
        }


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Whether to speculate, the options of the best setting, its speed-up, and all of this in a sentence.

    `flags` are empty and `speed_up` is 1 where plain decoding is best.
    """

    speculate: bool
    flags: str
    speed_up: float
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """The advice as plain data."""
        return asdict(self)


def make_advice(trials: Sequence[Trial]) -> Advice:
    """The fastest setting whose draft is smaller than the target, or plain decoding if none is faster by `MARGIN`."""
    smaller = [trial for trial in trials if trial.is_smaller]
    if not smaller:
        drafts = " and ".join(dict.fromkeys(trial.setting.draft for trial in trials))
        sentence = (
            f"Do not speculate: the model is no larger than the draft {drafts}, so drafts cost more than they save; "
            "choose a draft 10 to 20 times smaller."
        )
        return Advice(speculate=False, flags="", speed_up=1.0, sentence=sentence)
    best = max(smaller, key=lambda trial: trial.speed_up)
    flags, why = best.setting.flags, describe_cause(best)
    if best.speed_up < MARGIN:
        sentence = f"Do not speculate: the best setting, {flags}, {describe_speed(best)}; {why}."
        return Advice(speculate=False, flags="", speed_up=1.0, sentence=sentence)
    sentence = f"Speculate with {flags}, which {describe_speed(best)}; {why}."
    return Advice(speculate=True, flags=flags, speed_up=best.speed_up, sentence=sentence)


def describe_speed(trial: Trial) -> str:
    """`decodes 1.21 times as fast as without drafts (predicted 1.18)`."""
    if trial.measured is None:
        return f"is predicted to decode {trial.speed_up:.2f} times as fast as without drafts"
    return f"decodes {trial.measured:.2f} times as fast as without drafts (predicted {trial.prediction.speed_up:.2f})"


def describe_cause(trial: Trial) -> str:
    """`a pass writes 1.34 tokens and costs 1.10 plain passes`."""
    prediction = trial.prediction
    cost = prediction.draft_cost + prediction.verify_cost
    return f"a pass writes {prediction.tokens_per_pass:.2f} tokens and costs {cost:.2f} plain passes"


def summarize_errors(trials: Sequence[Trial]) -> dict[str, float] | None:
    """The median and the largest size of the predictions' relative errors; None if nothing was measured."""
    errors = [abs(trial.error) for trial in trials if trial.error is not None]
    return {"median": median(errors), "largest": max(errors)} if errors else None


def add_measurement(trial: Trial, speed: MeasuredSpeed, plain: MeasuredSpeed) -> Trial:
    """The trial with its measured speed-up; without one where the texts are too short to be timed."""
    is_timed = speed.tokens_per_second > 0 and plain.tokens_per_second > 0
    return replace(trial, measured=speed.tokens_per_second / plain.tokens_per_second if is_timed else None)


def list_differences(
    trials: Sequence[Trial], speeds: Sequence[MeasuredSpeed], plain: MeasuredSpeed
) -> list[dict[str, Any]]:
    """The first token of each greedy text that is not that of plain decoding, by setting and prompt."""
    return [
        {"flags": trial.setting.flags, "prompt": prompt, "token": token}
        for trial, speed in zip(trials, speeds, strict=True)
        for prompt, token in speed.find_differences(plain)
    ]


def describe_evidence(evidence: Sequence[Evidence], *, max_new_tokens: int) -> dict[str, Any]:
    """What the predictions follow from; costs are in plain passes, by the number of tokens of a draft.

    `acceptance` of a draft is that of its longest setting. `passes_with_draft` is the share of passes in which the
    drafter had a draft.
    """
    drafts = []
    for each in evidence:
        candidate, passes = each.candidate, [p for text in each.texts for p in text.passes if p.limit > 0]
        lengths = candidate.lengths or (candidate.speculation.length.longest,)
        costs = list_costs(each.draft_seconds, lengths, each.plain_seconds)
        prediction = each.predict(candidate.settings[-1], max_new_tokens=max_new_tokens)
        drafts.append(
            {
                "draft": candidate.draft,
                "tree": candidate.tree,
                "is_smaller": candidate.is_smaller,
                "parameter_share": candidate.parameter_share,
                "acceptance": list(prediction.acceptance),
                "passes_with_draft": sum(p.size > 0 for p in passes) / len(passes) if passes else 0.0,
                "cost": costs,
            }
        )
    chain = next(each for each in evidence if each.candidate.tree is None)
    verification = list_costs(chain.verify_seconds, chain.candidate.lengths, chain.plain_seconds)
    return {"plain_seconds": chain.plain_seconds, "verification_cost": verification, "drafts": drafts}


def list_costs(seconds: Mapping[int, float], lengths: Sequence[int], plain_seconds: float) -> dict[str, float]:
    """The costs at some lengths, in plain passes."""
    values = interpolate(seconds, lengths)
    return {str(length): value / plain_seconds for length, value in zip(lengths, values, strict=True)}


def write_advice(result: Mapping[str, Any], folder: Path) -> None:
    """Writes the result as JSON, and the chart."""
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    (folder / ADVICE_FILE).write_text(text, encoding="utf-8")
    title = f"Speculative decoding with {get_public_name(result['model'])}"
    page = render_html(result["settings"], title=title, advice=result["advice"]["sentence"])
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")
