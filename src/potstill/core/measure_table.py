"""The names, titles, units and formats of all measures, for cards, tables, arenas and charts.

Add a measure to `MEASURES`, and nowhere else. Cards and JSON publish the names; their order here is the order of
columns and axes.
"""

from collections.abc import Iterable, Mapping

from potstill.core.measure import Measure
from potstill.core.measure_info import MeasureInfo

MEBIBYTE = 1 << 20

MEASURES: Mapping[str, MeasureInfo] = {
    info.name: info
    for info in (
        MeasureInfo(
            name="bits_per_byte",
            title="bits per byte",
            column="bits per byte",
            unit="bits/byte",
            better="lower",
            kind="quality",
            decimals=3,
        ),
        MeasureInfo(
            name="teacher_kl",
            title="KL to the teacher (nats/token)",
            column="KL to teacher (nats)",
            unit="nats/token",
            better="lower",
            kind="quality",
            decimals=3,
        ),
        MeasureInfo(
            name="teacher_agreement",
            title="top-1 agreement with the teacher",
            column="agreement",
            unit="share",
            better="higher",
            kind="quality",
            decimals=3,
        ),
        MeasureInfo(
            name="acceptance",
            title="acceptance by the teacher of the model's drafts",
            column="acceptance",
            unit="share",
            better="higher",
            kind="quality",
            decimals=3,
            in_tables=False,
        ),
        MeasureInfo(
            name="perplexity",
            title="perplexity",
            column="perplexity",
            unit="1",
            better="lower",
            kind="quality",
            decimals=2,
            in_tables=False,
        ),
        MeasureInfo(
            name="rouge_l",
            title="ROUGE-L",
            column="ROUGE-L",
            unit="F1 x 100",
            better="higher",
            kind="quality",
            decimals=1,
        ),
        MeasureInfo(
            name="long_bits_per_byte",
            title="bits per byte in the second half of long windows",
            column="bits per byte, far",
            unit="bits/byte",
            better="lower",
            kind="quality",
            decimals=3,
        ),
        MeasureInfo(
            name="needle_accuracy",
            title="accuracy of the needle probe",
            column="needle",
            unit="share",
            better="higher",
            kind="quality",
            decimals=2,
        ),
        *(
            MeasureInfo(
                name=f"{name}{suffix}",
                title=f"{name} of edited facts ({kind})",
                column=f"{name}{column}",
                unit=f"{kind} x 100",
                better="higher",
                kind="quality",
                decimals=1,
            )
            for name in ("reliability", "generality", "locality", "portability")
            for suffix, kind, column in (("", "exact match", ""), ("_f1", "F1", ", F1"))
        ),
        MeasureInfo(
            name="preference_loss",
            title="loss of the objective on held-out preferences",
            column="loss",
            unit="1",
            better="lower",
            kind="quality",
            decimals=4,
        ),
        MeasureInfo(
            name="sampled_accuracy",
            title="accuracy of sampled answers",
            column="sampled accuracy",
            unit="share",
            better="higher",
            kind="quality",
            decimals=3,
        ),
        MeasureInfo(
            name="sampled_reward",
            title="reward of sampled answers",
            column="sampled reward",
            unit="1",
            better="higher",
            kind="quality",
            decimals=3,
        ),
        MeasureInfo(
            name="cut_samples",
            title="share of sampled answers that are cut",
            column="cut",
            unit="share",
            better="lower",
            kind="quality",
            decimals=3,
        ),
        MeasureInfo(
            name="sample_tokens",
            title="tokens of sampled answers",
            column="tokens of samples",
            unit="tokens",
            better="lower",
            kind="quality",
            decimals=1,
        ),
        MeasureInfo(
            name="reward_accuracy",
            title="accuracy of the implied reward",
            column="accuracy",
            unit="share",
            better="higher",
            kind="quality",
            decimals=3,
        ),
        MeasureInfo(
            name="reward_margin",
            title="margin of the implied reward, without beta (nats)",
            column="margin (nats)",
            unit="nats",
            better="higher",
            kind="quality",
            decimals=3,
        ),
        MeasureInfo(
            name="reference_kl",
            title="KL to the reference (nats/token)",
            column="KL to reference (nats)",
            unit="nats/token",
            better="lower",
            kind="quality",
            decimals=4,
        ),
        MeasureInfo(
            name="chosen_log_p",
            title="log-probability of chosen answers (nats)",
            column="log p of chosen",
            unit="nats",
            better="higher",
            kind="quality",
            decimals=1,
        ),
        MeasureInfo(
            name="rejected_log_p",
            title="log-probability of rejected answers (nats)",
            column="log p of rejected",
            unit="nats",
            better="lower",
            kind="quality",
            decimals=1,
        ),
        MeasureInfo(
            name="likelihood_accuracy",
            title="accuracy of the likelier answer",
            column="likelier is chosen",
            unit="share",
            better="higher",
            kind="quality",
            decimals=3,
        ),
        MeasureInfo(
            name="shorter_accuracy",
            title="accuracy of the shorter answer",
            column="shorter is chosen",
            unit="share",
            better="higher",
            kind="quality",
            decimals=3,
        ),
        MeasureInfo(
            name="chosen_tokens",
            title="tokens of chosen answers",
            column="tokens of chosen",
            unit="tokens",
            better="lower",
            kind="quality",
            decimals=1,
            in_tables=False,
        ),
        MeasureInfo(
            name="rejected_tokens",
            title="tokens of rejected answers",
            column="tokens of rejected",
            unit="tokens",
            better="lower",
            kind="quality",
            decimals=1,
            in_tables=False,
        ),
        MeasureInfo(
            name="parameters",
            title="parameters",
            column="parameters",
            unit="parameters",
            better="lower",
            kind="cost",
        ),
        MeasureInfo(
            name="bytes",
            title="weights on disk (MiB)",
            column="MiB on disk",
            unit="B",
            better="lower",
            kind="cost",
            scale=MEBIBYTE,
            in_tables=False,
        ),
        MeasureInfo(
            name="bfloat16_bytes",
            title="weights in bf16 (MiB)",
            column="MiB in bf16",
            unit="B",
            better="lower",
            kind="cost",
            scale=MEBIBYTE,
        ),
        MeasureInfo(
            name="prefill_tokens_per_second",
            title="prefill (tokens/s)",
            column="prefill tok/s",
            unit="tokens/s",
            better="higher",
            kind="cost",
        ),
        MeasureInfo(
            name="decode_tokens_per_second",
            title="decode (tokens/s)",
            column="decode tok/s",
            unit="tokens/s",
            better="higher",
            kind="cost",
            decimals=1,
        ),
        MeasureInfo(
            name="tokens_per_pass",
            title="tokens per pass of the target, with this draft",
            column="tokens per pass",
            unit="tokens",
            better="higher",
            kind="cost",
            decimals=2,
        ),
        MeasureInfo(
            name="predicted_speed_up",
            title="predicted speed-up of decoding with this draft",
            column="predicted speed-up",
            unit="1",
            better="higher",
            kind="cost",
            decimals=2,
        ),
        MeasureInfo(
            name="speed_up",
            title="measured speed-up of decoding with this draft",
            column="speed-up",
            unit="1",
            better="higher",
            kind="cost",
            decimals=2,
        ),
        MeasureInfo(
            name="peak_memory",
            title="peak memory (MiB)",
            column="peak MiB",
            unit="B",
            better="lower",
            kind="cost",
            scale=MEBIBYTE,
            in_tables=False,
        ),
    )
}
QUALITIES = tuple(name for name, info in MEASURES.items() if info.kind == "quality")
COSTS = tuple(name for name, info in MEASURES.items() if info.kind == "cost")
TABLE_QUALITIES = tuple(name for name in QUALITIES if MEASURES[name].in_tables)


def list_columns(models: Iterable[Mapping[str, Measure]]) -> list[MeasureInfo]:
    """The columns of a table of models: every measure for tables that at least one model has."""
    measured = {name for measures in models for name in measures}
    return [info for name, info in MEASURES.items() if info.in_tables and name in measured]


def format_measure(measure: Measure | None) -> str:
    """A value with its interval as a table shows it; `-` where there is no value.

    Speeds have the range of repeated runs instead of an interval; only charts show it.
    """
    if measure is None:
        return "-"
    info = MEASURES[measure.name]
    text = info.format(measure.value)
    if measure.low is None or measure.high is None or measure.low == measure.high or info.unit == "tokens/s":
        return text
    return f"{text} [{info.format(measure.low)}, {info.format(measure.high)}]"
