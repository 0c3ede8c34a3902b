"""The ratios that measures are defined by, from sums over documents."""

import math

from potstill.evaluate.agreement import TeacherComparison
from potstill.evaluate.perplexity import Scores


def bits_per_byte(scores: Scores) -> float:
    return float(scores.nll.sum() / (math.log(2) * scores.num_bytes.sum()))


def perplexity(scores: Scores) -> float:
    return math.exp(scores.nll.sum() / scores.num_tokens.sum())


def mean_kl(comparison: TeacherComparison) -> float:
    return float(comparison.kl.sum() / comparison.num_tokens.sum())


def agreement(comparison: TeacherComparison) -> float:
    return float(comparison.top1_matches.sum() / comparison.num_tokens.sum())
