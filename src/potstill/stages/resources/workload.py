"""Counts the work of a distillation without running it: operations, bytes of tensors, bytes of files.

`calibration.py` and `profiling.py` measure the rest: the bytes that autograd saves, and the
speed of the machine.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

from potstill.core.blueprint import Blueprint
from potstill.evaluate.size import Flops, count_blueprint_parameters, forward_flops, list_matrix_shapes
from potstill.models.families.registry import list_parameter_shapes
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.cost import CostInputs, ObjectiveCost
from potstill.ops import fused
from potstill.stages.resources.activation_memory import AutogradBytes
from potstill.stages.resources.dataset_stats import PackingStats, TeacherTokenization
from potstill.train.checkpoint import MIN_CHECKPOINTS
from potstill.train.config import TrainConfig
from potstill.train.selection import match_names

FLOAT32_BYTES = 4  # bytes of float32: master weights, gradients and both moments of the optimizer
DOCUMENT_BYTES, METRICS_LINE_BYTES = 128_000, 400  # bytes of card, README and curve; of a step's line in metrics.jsonl
STATE_BYTES = 45_000  # bytes of a checkpoint's random states, arguments, schedule and manifest
CACHE_ROW_BYTES = 131  # bytes a row at `--top-k 64` on real text (benchmarks/teacher_cache.py)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of a distillation. `source` gives the teacher's signals: `live`, `cached` or `alone` (no teacher).

    `vocabulary` is the student's where the teacher has another tokenizer (`teacher_tokenization`), else that of both.
    `more_teachers` are further teachers here, with the same tokenizer; every teacher reads `teacher_share` of the
    tokens. `sizes` are the smaller sizes of an elastic student, each with the share of the steps that train it.
    `shards` is the number of ranks that share the student's weights, gradients and optimizer states.
    """

    teacher: Blueprint
    student: Blueprint
    vocabulary: int
    settings: TrainConfig
    packing: PackingStats
    source: str = "live"
    lora: int = 0
    train: str | None = None
    shards: int = 1
    compute_bytes: int = 2
    teacher_bytes: int | None = None  # of a weight of the teacher, where it is not in the dtype of products
    saved_bytes: int = 2  # of a weight of the final folder
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    teacher_tokenization: TeacherTokenization | None = None
    more_teachers: tuple[Blueprint, ...] = ()
    teacher_share: float = 1.0
    sizes: tuple[tuple[float, Blueprint], ...] = ()

    @property
    def students(self) -> tuple[tuple[float, Blueprint], ...]:
        """The student, which every step trains, and its smaller sizes with their shares of the steps."""
        return ((1.0, self.student), *self.sizes)

    @property
    def student_passes(self) -> float:
        """Students that run in a pass."""
        return sum(share for share, _ in self.students)

    @property
    def trained_parameters(self) -> int:
        """Trained parameters: all, those that `train` matches, or LoRA's two for each matrix; and the objective's."""
        if self.lora:
            num_trained = sum(self.lora * (rows + columns) for rows, columns in list_matrix_shapes(self.student))
        elif self.train is not None:
            shapes = list_parameter_shapes(self.student)
            num_trained = sum(math.prod(shapes[name]) for name in match_names(shapes, self.train))
        else:
            num_trained = count_blueprint_parameters(self.student).total
        return num_trained + self.objective_cost.weights

    @property
    def backward_products(self) -> float:
        """Products for each matrix in a backward: one for the gradient of its input, and one for its own if trained.

        With `train` the second product counts by the share of the parameters that are trained.
        """
        if self.lora:
            return 1.0
        if self.train is None:
            return 2.0
        num_trained = self.trained_parameters - self.objective_cost.weights
        return 1.0 + num_trained / count_blueprint_parameters(self.student).total

    @cached_property
    def objective_cost(self) -> ObjectiveCost:
        """The operations and bytes of the teacher's share of the objective in a pass."""
        if self.source == "alone":
            return ObjectiveCost()
        tokenization, rows = self.teacher_tokenization, self.rows
        inputs = CostInputs(
            student=self.student,
            teacher=self.teacher,
            vocabularies=(self.vocabulary, tokenization.vocabulary if tokenization else self.vocabulary),
            rows=rows,
            teacher_rows=rows * (tokenization.row_ratio if tokenization else 1.0),
            aligned_rows=rows * (tokenization.aligned_share if tokenization else 1.0),
            document_rows=(2 * self.packing.seen - 1) * self.packing.trained,
            compute_bytes=self.compute_bytes,
        )
        return self.objective.compute_cost(inputs)

    @property
    def uses_teacher_head(self) -> bool:
        """Whether a step multiplies by the teacher's head: the teacher is live, or a cache has its last hidden
        states."""
        return self.source == "live" or (self.source == "cached" and self.objective.needs_only_last_hidden)

    @property
    def entries_per_row(self) -> float:
        """Entries of all compared distributions at one of the student's rows."""
        tokenization = self.teacher_tokenization
        return self.vocabulary + (
            tokenization.vocabulary * tokenization.row_ratio if tokenization and self.source == "live" else 0.0
        )

    @property
    def tokens(self) -> float:
        """Tokens in one pass."""
        settings = self.settings
        return settings.packs_per_pass() * settings.context * self.packing.fill

    @property
    def rows(self) -> float:
        """Positions in one pass at which the head is computed."""
        return self.tokens * self.packing.trained

    @property
    def passes(self) -> int:
        """Forward passes in one step."""
        return self.settings.accumulation_steps()

    def count_forward_flops(self, blueprint: Blueprint) -> Flops:
        """Operations per token of the text; only trained tokens go through the head, and only active experts count."""
        flops = forward_flops(blueprint, self.packing.seen)
        return Flops(flops.blocks, flops.attention, 2 * self.vocabulary * blueprint.hidden * self.packing.trained)

    @property
    def teacher_weight_bytes(self) -> int:
        """Bytes of a weight of the teacher; 0 for one that shares all its weights with the student."""
        return self.compute_bytes if self.teacher_bytes is None else self.teacher_bytes

    @property
    def teacher_parameters(self) -> int:
        """Parameters of all teachers whose weights are in memory."""
        return sum(count_blueprint_parameters(teacher).total for teacher in (self.teacher, *self.more_teachers))

    @property
    def teacher_flops(self) -> Flops:
        """Operations of all teachers' blocks per token of the student's text, and of their heads for one row."""
        tokenization = self.teacher_tokenization
        seen = tokenization.seen if tokenization else self.packing.seen
        forwards = [forward_flops(teacher, seen) for teacher in (self.teacher, *self.more_teachers)]
        hidden = self.teacher.hidden + sum(teacher.hidden for teacher in self.more_teachers)
        token_ratio, vocabulary = (
            (tokenization.token_ratio, tokenization.vocabulary) if tokenization else (1.0, self.vocabulary)
        )
        ratio = token_ratio * self.teacher_share
        blocks, attention = sum(flops.blocks for flops in forwards), sum(flops.attention for flops in forwards)
        return Flops(blocks * ratio, attention * ratio, 2.0 * vocabulary * hidden * self.teacher_share)

    @property
    def student_flops(self) -> Flops:
        """Operations of the student's forward per token of the text, its smaller sizes included."""
        passes = [(share, self.count_forward_flops(student)) for share, student in self.students]
        return Flops(
            sum(share * flops.blocks for share, flops in passes),
            sum(share * flops.attention for share, flops in passes),
            sum(share * flops.head for share, flops in passes),
        )

    def flops(self) -> dict[str, float]:
        """Operations per token by part.

        The student's loss is three products with the head: of its rows, of their gradient, and of the gradient of the
        head's weight. `objective_cost` counts the additional cost of the teacher. A backward is two products per
        matrix, or one per frozen matrix. In attention it is two and a half forwards, since the scores are
        computed again. With checkpointed activations the student's forward runs once more.
        """
        teacher, student, cost = self.teacher_flops, self.student_flops, self.objective_cost
        products = self.backward_products
        num_recomputed = 1 if self.settings.checkpoint_activations else 0
        head = (1 + products) * student.head * self.needs_student_logits
        teacher_operations = cost.student_products * 2 * self.vocabulary * self.student.hidden + cost.other_operations
        teacher_operations += cost.teacher_products * teacher.head if self.uses_teacher_head else 0.0
        return {
            "teacher forward": teacher.blocks + teacher.attention if self.source == "live" else 0.0,
            "student forward": student.blocks + student.attention,
            "backward": backward_flops(student, products=products)
            + num_recomputed * (student.blocks + student.attention),
            "head and loss": head + self.student_passes * teacher_operations / self.tokens,
        }

    @property
    def needs_student_logits(self) -> bool:
        """Whether the student's logits are computed; an objective over hidden states alone does not need them."""
        return self.source == "alone" or self.objective.cross_entropy > 0 or self.objective_cost.logit_copies != (0, 0)

    def memory_bytes(self, autograd_bytes: AutogradBytes) -> dict[str, float]:
        """Bytes that one step holds, by part.

        The sum counts parts that are not all in use at once, since the allocator keeps the memory that a part frees.
        `head` is the copy of the head in the dtype of products, and the gradients of head and embedding in a pass. In a
        step of one pass those are `gradients` themselves; only tied weights add a second one. `logits` are those of one
        chunk of rows of both models. `objective` are its constant copies of heads, or of parts of them. A teacher that
        the objective does not use stays in memory for the evaluation. Of a cached teacher only the head is in memory,
        and only if it is multiplied.
        """
        size, table_entries = count_blueprint_parameters(self.student), self.vocabulary * self.student.hidden
        num_gradients = (
            2 if self.passes > 1 else int(self.student.tied)
        )  # gradients of whole tables, in addition to `gradients`
        head_copy = float(table_entries * self.compute_bytes if self.compute_bytes < FLOAT32_BYTES else 0)
        head_gradient = 0.0 if self.lora else head_copy
        head = self.uses_teacher_head * self.vocabulary * self.teacher.hidden
        teacher = head if self.source == "cached" else self.teacher_parameters
        return {
            "weights": FLOAT32_BYTES * float(size.total + self.objective_cost.weights) / self.shards,
            "gradients": FLOAT32_BYTES * float(self.trained_parameters) / self.shards,
            "optimizer": 2 * FLOAT32_BYTES * float(self.trained_parameters) / self.shards,
            "teacher": float(self.teacher_weight_bytes * teacher),
            "activations": self.activation_bytes(autograd_bytes),
            "head": head_copy + (0 if self.lora else num_gradients * FLOAT32_BYTES * table_entries),
            "logits": self.logit_bytes() + head_gradient,
            "objective": self.objective_cost.held_bytes + (head_copy if self.objective_cost.student_products else 0.0),
        }

    def logit_bytes(self) -> float:
        """Bytes of the logits of one chunk of rows: of the student, and copies over either vocabulary."""
        chunk = min(fused.rows_per_chunk(self.vocabulary), max(1.0, self.rows))
        student_copies, teacher_copies = self.objective_cost.logit_copies if self.uses_teacher_head else (0, 0)
        teacher_vocabulary = self.teacher_tokenization.vocabulary if self.teacher_tokenization else self.vocabulary
        return float(
            chunk * self.compute_bytes * ((1 + student_copies) * self.vocabulary + teacher_copies * teacher_vocabulary)
        )

    def activation_bytes(self, autograd_bytes: AutogradBytes) -> float:
        """Bytes that a pass keeps for its backward: all of each block, or with checkpoints its input and all of one.

        A block's input, the residual stream, is float32 as the weights are. All sizes of a student share one backward;
        their blocks count at full width.
        """
        num_layers = sum(share * len(student.layers) for share, student in self.students)
        block_bytes = self.tokens * autograd_bytes.per_token_layer + autograd_bytes.per_layer
        pass_bytes = self.student_passes * self.tokens * autograd_bytes.per_token
        if self.settings.checkpoint_activations:
            return pass_bytes + block_bytes + num_layers * self.tokens * self.student.hidden * FLOAT32_BYTES
        return pass_bytes + num_layers * block_bytes

    @property
    def model_bytes(self) -> float:
        """Bytes of all models in memory while they train: float32 masters of the student, and the teachers."""
        student = FLOAT32_BYTES * float(count_blueprint_parameters(self.student).total)
        return student + self.teacher_weight_bytes * self.teacher_parameters

    def loading_bytes(self) -> float:
        """Bytes of both models as they are read, in float32."""
        return FLOAT32_BYTES * float(count_blueprint_parameters(self.student).total + self.teacher_parameters)

    def disk_bytes(self, tokenizer_bytes: int) -> dict[str, float]:
        """Bytes by part: one checkpoint, the final folder, and the most on disk at once.

        The trainer deletes an older checkpoint after the next is complete, and all after the final folder is complete.
        """
        settings, num_trained = self.settings, self.trained_parameters
        size = count_blueprint_parameters(self.student).total
        weights = FLOAT32_BYTES * (num_trained if self.lora else size + self.objective_cost.weights)
        checkpoint = weights + 2 * FLOAT32_BYTES * num_trained + tokenizer_bytes + STATE_BYTES
        final = self.saved_bytes * size + tokenizer_bytes + DOCUMENT_BYTES + METRICS_LINE_BYTES * settings.steps
        saves = -(-settings.steps // (settings.save_every or max(10, settings.steps // 10)))
        spare = 1 if settings.patience else 0
        most = max(MIN_CHECKPOINTS, settings.keep_checkpoints) + spare
        checkpoint_peak = min(saves, most + 1) * checkpoint
        final_peak = min(saves, most) * checkpoint + final
        return {"checkpoint": float(checkpoint), "final": float(final), "most": float(max(checkpoint_peak, final_peak))}

    def cache_bytes(self) -> float:
        """Bytes of a teacher's cache (`potstill cache`, top 64) of the text that is trained on."""
        row = CACHE_ROW_BYTES + (2 * self.teacher.hidden if self.objective.needs_only_last_hidden else 0)
        return row * (self.settings.tokens or 0) * self.packing.fill * self.packing.trained


def backward_flops(forward: Flops, *, products: float) -> float:
    """Operations of a backward through the blocks: so many products a matrix, and 2.5 forwards of attention."""
    return products * forward.blocks + 2.5 * forward.attention
