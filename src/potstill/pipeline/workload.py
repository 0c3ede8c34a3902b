"""What a distillation has to do and to hold, counted from values alone: operations, tensors' bytes, files' bytes.

Nothing here is measured. What depends on code that is not ours or changes (how much autograd saves, how fast a machine
multiplies) comes in from `calibrate.py`.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from potstill.core.blueprint import Blueprint
from potstill.evaluate.size import Flops, forward_flops, linears, stored
from potstill.objectives.named import Mixture
from potstill.ops import fused
from potstill.pipeline.taught import Asked, Taught, numbers, taught
from potstill.pipeline.texture import Otherwise, Texture
from potstill.train.settings import Settings

WIDE = 4  # bytes of float32: master weights, gradients and both moments of the optimiser
KEPT_CHECKPOINTS = 2  # by `train.checkpoint.seal`, which removes the oldest once the newest is in place
PAPERS, LINE = 128_000, 400  # bytes of card, README and curve; of a step's line in metrics.jsonl
STATES = 45_000  # bytes of a checkpoint's random states, arguments, schedule and manifest
CACHE_ROW = 131  # bytes a row at `--top-k 64` on real text (benchmarks/teacher_cache.py)


class Saved(NamedTuple):
    """Bytes that autograd keeps for the backward: per token and layer, per token besides, per layer besides."""

    per_token_layer: float
    per_token: float
    per_layer: float


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A run of `Distill` as sizes. `source` is where the teacher's signals come from: live, cached or alone (none).

    `vocabulary` is the student's where the teacher reads `otherwise`, else that of both.
    """

    teacher: Blueprint
    student: Blueprint
    vocabulary: int
    settings: Settings
    texture: Texture
    source: str = "live"
    lora: int = 0
    compute_bytes: int = 2
    objective: Mixture = field(default_factory=Mixture)
    otherwise: Otherwise | None = None

    @property
    def trained(self) -> int:
        """Parameters trained: all, or LoRA's two matrices beside each one in the blocks; and the objective's."""
        if not self.lora:
            return stored(self.student).total + self.taught.weights
        return sum(self.lora * (rows + columns) for rows, columns in linears(self.student)) + self.taught.weights

    @cached_property
    def taught(self) -> Taught:
        """What the teacher's share of the objective computes and holds in a pass."""
        if self.source == "alone":
            return Taught()
        apart, rows = self.otherwise, self.rows
        asked = Asked(
            student=self.student,
            teacher=self.teacher,
            vocabularies=(self.vocabulary, apart.vocabulary if apart else self.vocabulary),
            rows=rows,
            others=rows * (apart.rows if apart else 1.0),
            pairs=rows * (apart.aligned if apart else 1.0),
            near=(2 * self.texture.seen - 1) * self.texture.trained,
            numbers=numbers(self.objective),
            compute_bytes=self.compute_bytes,
        )
        return taught(self.objective, asked)

    @property
    def heard(self) -> bool:
        """Whether the teacher's head is multiplied: where it is live, or a cache kept the states before its head."""
        return self.source == "live" or (self.source == "cached" and self.objective.recalled)

    @property
    def entries(self) -> float:
        """Entries of all distributions that are compared at one of the student's rows."""
        apart = self.otherwise
        return self.vocabulary + (apart.vocabulary * apart.rows if apart and self.source == "live" else 0.0)

    @property
    def tokens(self) -> float:
        """Tokens in one pass."""
        settings = self.settings
        return settings.packs_per_pass() * settings.context * self.texture.fill

    @property
    def rows(self) -> float:
        """Positions in one pass at which the head is computed."""
        return self.tokens * self.texture.trained

    @property
    def passes(self) -> int:
        """Forward passes in one step."""
        return self.settings.accumulation()

    def forward(self, blueprint: Blueprint) -> Flops:
        """Operations per token of the text, of which only the trained ones go through the head."""
        each = forward_flops(blueprint, self.texture.seen)
        return Flops(each.blocks, each.attention, 2 * self.vocabulary * blueprint.hidden * self.texture.trained)

    @property
    def reading(self) -> Flops:
        """Operations of the teacher's blocks per token of the student's text; a product of its head with one row."""
        apart = self.otherwise
        each = forward_flops(self.teacher, apart.seen if apart else self.texture.seen)
        often, ids = (apart.tokens, apart.vocabulary) if apart else (1.0, self.vocabulary)
        return Flops(each.blocks * often, each.attention * often, 2.0 * ids * self.teacher.hidden)

    def flops(self) -> dict[str, float]:
        """Operations per token by part.

        The student's loss is, under `head`, one product of its rows, one for their gradient and one for that of the
        head's weight; what its teacher adds says `taught`. A backward is two products per matrix and, in attention, two
        and a half forwards (scores are computed again); of frozen matrices under LoRA one. With checkpointed
        activations the student's forward comes once more.
        """
        teacher, student, more = self.reading, self.forward(self.student), self.taught
        products = 1 if self.lora else 2
        again = 1 if self.settings.checkpoint_activations else 0
        head = (1 + products) * student.head * self.judged
        beside = more.student * 2 * self.vocabulary * self.student.hidden + more.other
        beside += more.teacher * teacher.head if self.heard else 0.0
        return {
            "teacher forward": teacher.blocks + teacher.attention if self.source == "live" else 0.0,
            "student forward": student.blocks + student.attention,
            "backward": backward_flops(student, products=products) + again * (student.blocks + student.attention),
            "head and loss": head + beside / self.tokens,
        }

    @property
    def judged(self) -> bool:
        """Whether the student's logits are asked for, which an objective over hidden states alone does not."""
        return self.source == "alone" or self.objective.cross_entropy > 0 or self.taught.whole != (0, 0)

    def memory(self, saved: Saved) -> dict[str, float]:
        """Bytes that one step holds, by part.

        They are added up although not all live at once: what a part frees goes back to the allocator, which keeps it.
        `head` is the head's copy in the dtype of the products, and the gradients of head and embedding as a pass makes
        them; in a step of one pass those are `gradients` themselves, but for one of the two that tied weights add up.
        `logits` are those of one chunk of rows of both models.
        `objective` is what it holds beside its weights: constant copies of heads or parts of them.
        A teacher that teaches nothing waits to be measured beside; one that is cached is read again for that, but for
        the head, where that is multiplied.
        """
        size, table = stored(self.student), self.vocabulary * self.student.hidden
        apart = 2 if self.passes > 1 else int(self.student.tied)  # gradients of tables that lie beside `gradients`
        copied = float(table * self.compute_bytes if self.compute_bytes < WIDE else 0)
        gradient = 0.0 if self.lora else copied
        head = self.heard * self.vocabulary * self.teacher.hidden
        teacher = head if self.source == "cached" else stored(self.teacher).total
        return {
            "weights": WIDE * float(size.total + self.taught.weights),
            "gradients": WIDE * float(self.trained),
            "optimiser": 2 * WIDE * float(self.trained),
            "teacher": float(self.compute_bytes * teacher),
            "activations": self.activations(saved),
            "head": copied + (0 if self.lora else apart * WIDE * table),
            "logits": self.logits() + gradient,
            "objective": self.taught.held + (copied if self.taught.student else 0.0),
        }

    def logits(self) -> float:
        """Bytes of the logits of one chunk of rows: the student's, and what is said of them over either vocabulary."""
        chunk = min(fused.rows_at_once(self.vocabulary), max(1.0, self.rows))
        ours, theirs = self.taught.whole if self.heard else (0, 0)
        others = self.otherwise.vocabulary if self.otherwise else self.vocabulary
        return float(chunk * self.compute_bytes * ((1 + ours) * self.vocabulary + theirs * others))

    def activations(self, saved: Saved) -> float:
        """Bytes that a pass keeps for its backward: all of each block, or with checkpoints its input and all of one.

        A block's input, the residual stream, is float32 as the weights are.
        """
        layers, block = len(self.student.layers), self.tokens * saved.per_token_layer + saved.per_layer
        beside = self.tokens * saved.per_token
        if self.settings.checkpoint_activations:
            return beside + block + layers * self.tokens * self.student.hidden * WIDE
        return beside + layers * block

    def loading(self) -> float:
        """Bytes of both models as they are read, in float32."""
        return WIDE * float(stored(self.student).total + stored(self.teacher).total)

    def disk(self, tokenizer: int) -> dict[str, float]:
        """Bytes by part: one checkpoint, the final folder, and the most that lies there at once.

        A checkpoint is whole before an older one goes, and the final folder before the checkpoints go.
        """
        settings, trained = self.settings, self.trained
        size = stored(self.student).total
        weights = WIDE * (trained if self.lora else size + self.taught.weights)
        checkpoint = weights + 2 * WIDE * trained + tokenizer + STATES
        final = WIDE * size + tokenizer + PAPERS + LINE * settings.steps
        saves = -(-settings.steps // (settings.save_every or max(10, settings.steps // 10)))
        spare = 1 if settings.patience else 0
        saving = min(saves, KEPT_CHECKPOINTS + spare + 1) * checkpoint
        ending = min(saves, KEPT_CHECKPOINTS + spare) * checkpoint + final
        return {"checkpoint": float(checkpoint), "final": float(final), "most": float(max(saving, ending))}

    def cache(self) -> float:
        """Bytes of a teacher's cache (`potstill cache`, top 64) of the text that is trained on."""
        row = CACHE_ROW + (2 * self.teacher.hidden if self.objective.recalled else 0)
        return row * self.settings.tokens * self.texture.fill * self.texture.trained


def backward_flops(forward: Flops, *, products: int) -> float:
    """Operations of a backward through the blocks: so many products a matrix, and 2.5 forwards of attention."""
    return products * forward.blocks + 2.5 * forward.attention
