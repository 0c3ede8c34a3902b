"""Objectives that have to know both networks before training, by name: how each is built, and between whom."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from potstill.core.errors import UsageError
from potstill.core.types import Objective
from potstill.objectives.attention_relations import AttentionRelations, find_num_heads
from potstill.objectives.dual_space import DualSpace, DualSpaceConfig, DualSpaceV2
from potstill.objectives.hidden_states import HiddenStates, check_layers, map_layers_evenly, parse_layer_map
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.mined import MinED
from potstill.objectives.minillm import MiniLLM
from potstill.objectives.model_info import PairInfo
from potstill.objectives.row_matching import AlignedRowMatcher, CrossModelAttention
from potstill.objectives.spans import Spans
from potstill.objectives.tie_kd import TieKD
from potstill.objectives.uld import ULD
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops.divergence import Divergence, reverse_kl

LAYER_MAP_OPTION = "map"  # the option that names the layers of `hidden`


class ObjectiveOptions(NamedTuple):
    """What a user says of an objective: name, the divergence inside it, temperature, other numbers, and texts."""

    name: str
    divergence: Divergence
    temperature: float
    numeric_options: Mapping[str, float]
    text_options: Mapping[str, str]

    @property
    def dual_space_config(self) -> DualSpaceConfig:
        """The same for a dual-space objective."""
        return DualSpaceConfig(divergence=self.divergence, temperature=self.temperature, name=self.name)

    def get_positive_int(self, option: str) -> int:
        """The option of this name as a number of things.

        Raises: UsageError where it is no whole number of 1 or more.
        """
        value = self.numeric_options[option]
        if not (value >= 1 and float(value).is_integer()):
            raise UsageError(f"{self.name}: {option} = {value:g} counts nothing; choose a whole number of 1 or more")
        return int(value)


class ObjectiveSpec(NamedTuple):
    """`build` makes the objective; `alike` and `across` say whether it works with one tokenizer and between two.

    `options` are the numbers that it takes, with their defaults, and `texts` names what else it can be told;
    `divergence` says whether it takes one, and `warped` whether rows of two tokenizers have to be paired by edit
    distance. What is `recalled` asks a teacher for its last hidden states and its head alone, so that a cache that kept
    those states can take the place of its body.
    """

    build: Callable[[PairInfo, ObjectiveOptions], Objective]
    supports_same_tokenizer: bool = True
    supports_cross_tokenizer: bool = False
    takes_divergence: bool = True
    needs_edit_alignment: bool = False
    needs_only_last_hidden: bool = False
    numeric_options: Mapping[str, float] = MappingProxyType({})
    text_options: tuple[str, ...] = ()


def build_dskd(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`DualSpace` row by row."""
    return DualSpace(pair.student.hidden_size, pair.teacher.hidden_size, options.dual_space_config)


def build_dskd_cma(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`DualSpace` by cross-model attention."""
    student, teacher = pair.student, pair.teacher
    bridge = CrossModelAttention(
        student.hidden_size, teacher.hidden_size, embedding_std=teacher.compute_embedding_std()
    )
    return DualSpace(student.hidden_size, teacher.hidden_size, options.dual_space_config, bridge)


def build_dskdv2(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`DualSpaceV2` row by row."""
    return DualSpaceV2(
        pair.student.head.weight,
        pair.teacher.head.weight,
        options.dual_space_config,
        logit_scale_ratio=pair.logit_scale_ratio,
    )


def build_dskdv2_eta(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`DualSpaceV2` at exactly aligned tokens."""
    head_weights = pair.student.head.weight, pair.teacher.head.weight
    return DualSpaceV2(
        *head_weights, options.dual_space_config, AlignedRowMatcher(), pair.shared_token_ids, pair.logit_scale_ratio
    )


def build_minillm(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """The policy's gradient and the single step by which the next token alone is judged, both weighing 1."""
    single_step = LogitDistillation(
        divergence=reverse_kl, temperature=options.temperature, name=f"{options.name}_single_step"
    )
    teacher_share, scale, clip, discount = (options.numeric_options[name] for name in MINILLM_DEFAULTS)
    policy = MiniLLM(
        teacher_share=teacher_share, scale=scale, clip=clip, discount=discount, name=f"{options.name}_policy"
    )
    return WeightedSum((1.0, policy), (1.0, single_step))


MINILLM_DEFAULTS = MappingProxyType(
    {"mixed": 0.2, "scale": 0.5, "clip": 0.2, "discount": 0.95}
)  # those of `PolicyGradient`


def build_uld(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`SortedGap`."""
    return ULD(temperature=options.temperature, name=options.name)


def build_tie_kd(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`Ranking`."""
    return TieKD(
        k=options.get_positive_int("k"),
        divergence=options.divergence,
        temperature=options.temperature,
        name=options.name,
    )


def build_mined(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`Edited`."""
    return MinED(pair.nearest_ids, pair.vocab_sizes[0], temperature=options.temperature, name=options.name)


def build_spans(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`Merged`."""
    return Spans(
        pair.shared_token_ids,
        pair.vocab_sizes,
        divergence=options.divergence,
        temperature=options.temperature,
        name=options.name,
    )


def build_hidden(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`Hidden` at the layers of a `map`, else at some evenly spread."""
    student, teacher = pair.student, pair.teacher
    depths = student.num_layers, teacher.num_layers
    layers = (
        parse_layer_map(options.text_options[LAYER_MAP_OPTION])
        if LAYER_MAP_OPTION in options.text_options
        else map_layers_evenly(depths, options.get_positive_int("layers"))
    )
    check_layers(layers, depths)
    return HiddenStates((student.hidden_size, teacher.hidden_size), layers, name=options.name)


def build_relations(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`Relations` with as many heads as divide the teacher's widths."""
    widths = pair.teacher.relation_widths
    return AttentionRelations(
        pair.student.hidden_size, widths, heads=find_num_heads(widths, options.get_positive_int("heads"))
    )


OBJECTIVE_SPECS: Mapping[str, ObjectiveSpec] = MappingProxyType(
    {
        "dskd": ObjectiveSpec(build_dskd, needs_only_last_hidden=True),
        "dskd_cma": ObjectiveSpec(build_dskd_cma, supports_cross_tokenizer=True),
        "dskdv2": ObjectiveSpec(build_dskdv2, needs_only_last_hidden=True),
        "dskdv2_eta": ObjectiveSpec(build_dskdv2_eta, supports_cross_tokenizer=True),
        "minillm": ObjectiveSpec(build_minillm, takes_divergence=False, numeric_options=MINILLM_DEFAULTS),
        "uld": ObjectiveSpec(build_uld, supports_cross_tokenizer=True, takes_divergence=False),
        "mined": ObjectiveSpec(
            build_mined, supports_cross_tokenizer=True, takes_divergence=False, needs_edit_alignment=True
        ),
        "spans": ObjectiveSpec(build_spans, supports_cross_tokenizer=True),
        "tie_kd": ObjectiveSpec(build_tie_kd, needs_only_last_hidden=True, numeric_options=MappingProxyType({"k": 5})),
        "hidden": ObjectiveSpec(
            build_hidden,
            supports_cross_tokenizer=True,
            takes_divergence=False,
            numeric_options=MappingProxyType({"layers": 4}),
            text_options=(LAYER_MAP_OPTION,),
        ),
        "relations": ObjectiveSpec(
            build_relations,
            supports_cross_tokenizer=True,
            takes_divergence=False,
            numeric_options=MappingProxyType({"heads": 32}),
        ),
    }
)
