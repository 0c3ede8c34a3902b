"""The options of a policy gradient over groups of samples; GRPO, Dr. GRPO, DAPO and RLOO are values of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from potstill.core.errors import UsageError
from potstill.core.suggestions import suggest
from potstill.ops.advantage import SCALES

SEQUENCES, TOKENS, CONSTANT = "sequences", "tokens", "constant"
KEEP, DROP, PENALIZE = "keep", "drop", "penalize"
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"normalization": (SEQUENCES, TOKENS, CONSTANT), "scale_rewards": SCALES, "overlong": (KEEP, DROP, PENALIZE)}
)
VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "grpo": {},
        "dr_grpo": {"normalization": CONSTANT, "scale_rewards": "none"},
        "dapo": {"normalization": TOKENS, "clip_high": 0.28, "overlong": PENALIZE, "refills": 10},
        "rloo": {"normalization": CONSTANT, "length": 1, "scale_rewards": "none", "leave_one_out": True},
    }
)
VARIANT = "variant"  # the option that names one of them


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """How samples become a loss. The defaults are those of GRPO, with one update and without a reference.

    Attributes:
        normalization: what the sum over tokens is divided by. `sequences`: each sample by its tokens, then the sum by
            the samples of the step (GRPO). `tokens`: the sum by the tokens of the step (DAPO). `constant`: the sum by
            the samples times `length` (Dr. GRPO; RLOO with a length of 1).
        length: that constant; 0 stands for the most tokens that a sample may have.
        scale_rewards: what centered rewards are divided by (`ops.advantage.compute_group_advantages`).
        leave_one_out: whether a sample is compared with the others of its group alone (RLOO).
        clip_low: how far a ratio may fall below 1 before it has no gradient.
        clip_high: how far it may rise above 1 (DAPO: 0.28).
        kl: the weight of k3, which estimates KL(policy || reference) (DeepSeekMath: 0.04); 0 needs no reference.
        updates: optimizer steps for each set of samples. From the second on, ratios compare with the policy that drew.
        overlong: a sample that was cut is kept, dropped (it neither counts nor has a gradient), or penalized: the
            reward falls linearly by up to 1 in the last `overlong_buffer` of the allowed tokens.
        overlong_buffer: that share.
        refills: how often flat groups, all of whose rewards are equal, are replaced by those of other prompts (DAPO).
        temperature: at which tokens are drawn, and their log-probabilities computed.

    Sources: Shao et al., "DeepSeekMath" (arXiv:2402.03300); Liu et al., "Understanding R1-Zero-Like Training"
    (arXiv:2503.20783); Yu et al., "DAPO" (arXiv:2503.14476), section 3; Ahmadian et al., "Back to Basics"
    (arXiv:2402.14740). Departs from them: RLOO clips the ratio of each token, as the others do, and not that of the
    whole sample. With one update there is no difference.

    Raises: UsageError for a value out of its range.
    """

    normalization: str = SEQUENCES
    length: int = 0
    scale_rewards: str = "group"
    leave_one_out: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0
    updates: int = 1
    overlong: str = KEEP
    overlong_buffer: float = 0.2
    refills: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise UsageError(
                    f"grpo: {name} is {value!r}{suggest(value, choices)}; choose one of {', '.join(choices)}"
                )
        ranges = {
            "clip_low": (0 <= self.clip_low < 1, "from 0 to below 1"),
            "clip_high": (0 <= self.clip_high < math.inf, "of at least 0"),
            "kl": (0 <= self.kl < math.inf, "of at least 0"),
            "length": (self.length >= 0, "of at least 0"),
            "updates": (self.updates >= 1, "of at least 1"),
            "refills": (self.refills >= 0, "of at least 0"),
            "overlong_buffer": (0 < self.overlong_buffer <= 1, "above 0, up to 1"),
            "temperature": (0 < self.temperature < math.inf, "above 0; greedy samples would all be the same"),
        }
        for name, (is_valid, text) in ranges.items():
            if not is_valid:
                raise UsageError(f"grpo: {name} is {getattr(self, name):g}; choose a number {text}")

    @classmethod
    def from_options(cls, numbers: Mapping[str, float], texts: Mapping[str, str]) -> "PolicyOptions":
        """The options of a variant with what is given instead; a number that is NaN is not given.

        Raises: UsageError for an unknown variant, a number that should be whole, or a value out of its range.
        """
        variant = texts.get(VARIANT, "grpo")
        if variant not in VARIANTS:
            raise UsageError(
                f"grpo has no variant {variant!r}{suggest(variant, VARIANTS)}; choose one of {', '.join(VARIANTS)}"
            )
        types = {field.name: field.type for field in fields(cls)}
        options: dict[str, Any] = {**VARIANTS[variant]}
        options |= {name: text for name, text in texts.items() if name != VARIANT}
        options |= {
            name: _convert(name, value, types[name]) for name, value in numbers.items() if not math.isnan(value)
        }
        return cls(**options)

    @property
    def uses_reference(self) -> bool:
        """Whether it needs the frozen network `reference`."""
        return self.kl > 0


# the numbers that the command line takes; NaN stands for the value of the variant
NUMERIC_OPTIONS: Mapping[str, float] = MappingProxyType(
    {field.name: math.nan for field in fields(PolicyOptions) if field.name not in CHOICES}
)
TEXT_OPTIONS = (VARIANT, *CHOICES)


def _convert(name: str, value: float, kind: Any) -> Any:
    """A number as the type of its option."""
    if kind is float:
        return value
    if not value.is_integer() or (kind is bool and value not in (0, 1)):
        raise UsageError(f"grpo: {name} is {value:g}; choose {'0 or 1' if kind is bool else 'a whole number'}")
    return kind(value)
