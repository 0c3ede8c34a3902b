"""What a distillation has to do and to hold, counted from values alone: operations, tensors' bytes, files' bytes.

Nothing here is measured. What depends on code that is not ours or changes (how much autograd saves, how fast a machine
multiplies) comes in from `calibrate.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple

from potstill.core.blueprint import Blueprint
from potstill.data.pack import Packs
from potstill.evaluate.size import Flops, forward_flops, linears, stored
from potstill.ops import fused
from potstill.train.settings import Settings

WIDE = 4  # bytes of float32: master weights, gradients and both moments of the optimiser
KEPT_CHECKPOINTS = 2  # by `train.checkpoint.seal`, which removes the oldest once the newest is in place
PAPERS, LINE = 128_000, 400  # bytes of card, README and curve; of a step's line in metrics.jsonl
STATES = 45_000  # bytes of a checkpoint's random states, arguments, schedule and manifest
CACHE_ROW = 176  # bytes a row at `--top-k 64` on real text; at most 200 (docs/cache.md)


class Texture(NamedTuple):
    """What the packs of a text are like: how full, how much of it is trained, how many tokens a token sees."""

    fill: float
    trained: float
    seen: float


def texture(packs: Packs) -> Texture:
    """The texture of packs; a token at place n of its document sees n tokens."""
    lengths = packs.lengths.astype("float64")
    return Texture(packs.fill, packs.trained / packs.tokens, float((lengths * (lengths + 1) / 2).sum() / lengths.sum()))


class Saved(NamedTuple):
    """Bytes that autograd keeps for the backward: per token and layer, per token besides, per layer besides."""

    per_token_layer: float
    per_token: float
    per_layer: float


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A run of `Distill` as sizes. `source` is where the teacher's signals come from: live, cached or alone (none)."""

    teacher: Blueprint
    student: Blueprint
    vocabulary: int
    settings: Settings
    texture: Texture
    source: str = "live"
    lora: int = 0
    compute_bytes: int = 2

    @property
    def trained(self) -> int:
        """Parameters that are trained: all, or LoRA's two matrices beside each one in the blocks."""
        if not self.lora:
            return stored(self.student).total
        return sum(self.lora * (rows + columns) for rows, columns in linears(self.student))

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

    def flops(self) -> dict[str, float]:
        """Operations per token by part.

        The head of both models is counted under `head`: one product of teacher and student each, one for the gradient
        of the rows and one for that of the head's weight. A backward is two products per matrix and, in attention, two
        and a half forwards (scores are computed again); of frozen matrices under LoRA one. With checkpointed
        activations the student's forward comes once more.
        """
        teacher, student = self.forward(self.teacher), self.forward(self.student)
        products = 1 if self.lora else 2
        again = 1 if self.settings.checkpoint_activations else 0
        live = self.source == "live"
        return {
            "teacher forward": teacher.blocks + teacher.attention if live else 0.0,
            "student forward": student.blocks + student.attention,
            "backward": backward_flops(student, products=products) + again * (student.blocks + student.attention),
            "head and loss": (1 + products) * student.head + (teacher.head if live else 0.0),
        }

    def memory(self, saved: Saved) -> dict[str, float]:
        """Bytes that one step holds, by part.

        They are added up although not all live at once: what a part frees goes back to the allocator, which keeps it.
        `head` is the gradient of the head's weight as the loss makes it, its copy in the dtype of the products, and the
        embedding's gradient where that is a tensor of its own. `logits` are those of one chunk of rows of both models.
        A teacher that teaches nothing waits to be measured beside; one that is cached is read again for that.
        """
        size, table = stored(self.student), self.vocabulary * self.student.hidden
        chunk = min(fused.rows_at_once(self.vocabulary), max(1.0, self.rows))
        copied = table * self.compute_bytes if self.compute_bytes < WIDE else 0
        live = self.source == "live"
        return {
            "weights": WIDE * float(size.total),
            "gradients": WIDE * float(self.trained),
            "optimiser": 2 * WIDE * float(self.trained),
            "teacher": 0.0 if self.source == "cached" else float(self.compute_bytes * stored(self.teacher).total),
            "activations": self.activations(saved),
            "head": float(copied + (0 if self.lora else 2 * WIDE * table)),
            "logits": chunk * self.vocabulary * self.compute_bytes * (2 if live else 1) + (0 if self.lora else copied),
        }

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
        weights = WIDE * (trained if self.lora else size)
        checkpoint = weights + 2 * WIDE * trained + tokenizer + STATES
        final = WIDE * size + tokenizer + PAPERS + LINE * settings.steps
        saves = -(-settings.steps // (settings.save_every or max(10, settings.steps // 10)))
        spare = 1 if settings.patience else 0
        saving = min(saves, KEPT_CHECKPOINTS + spare + 1) * checkpoint
        ending = min(saves, KEPT_CHECKPOINTS + spare) * checkpoint + final
        return {"checkpoint": float(checkpoint), "final": float(final), "most": float(max(saving, ending))}

    def cache(self) -> float:
        """Bytes of a teacher's cache (`potstill cache`, top 64) of the text that is trained on."""
        return CACHE_ROW * self.settings.tokens * self.texture.fill * self.texture.trained


def backward_flops(forward: Flops, *, products: int) -> float:
    """Operations of a backward through the blocks: so many products a matrix, and 2.5 forwards of attention."""
    return products * forward.blocks + 2.5 * forward.attention
