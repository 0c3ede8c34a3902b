"""Learns the edit of one fact: one change of neurons that makes the model answer its target in every language.

    min over delta of  sum_l -log P(y_l | x_l, delta) + weight * sum_l KL(P(. | z_l) || P(. | z_l, delta))
    subject to  ||delta_i|| <= clamp * ||a_i||  in every layer i

x_l is the question in language l, y_l its target with the token that ends it, and z_l a neutral prompt that holds the
subject alone. delta_i is added to the activations a_i of the chosen neurons, at the subject's last token. The model is
frozen. With delta_i = theta_i ||a_i|| / sqrt(N_i), Adam learns theta, which has no unit, from zero. It stops early
where every target is the greedy answer.

Source: Zhang et al. (arXiv:2406.16416) for one change of shared neurons; the terms follow ROME (Meng et al.,
arXiv:2202.05262, Eq. 4), and the clamp MEMIT's code. No official code exists; sums, clamp and optimizer are ours.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel

from potstill.models.edits import NeuronDelta, PlacedEdit, apply_edits
from potstill.models.eval_mode import eval_mode
from potstill.models.feed_forward import pad_texts
from potstill.models.probing import is_close
from potstill.transforms.neurons import Neurons


class EditText(NamedTuple):
    """Token ids with the edited token `position`; the target begins at `start`, behind the edited token."""

    ids: Sequence[int]
    position: int
    start: int


@dataclass(frozen=True, kw_only=True)
class FactEditConfig:
    """How an edit is learned: at most `steps` of Adam, `clamp` relative to the activations, `neutral_weight` of the KL.

    `learning_rate` is a step of theta, which has no unit.
    """

    steps: int = 25
    learning_rate: float = 0.3
    clamp: float = 1.0
    neutral_weight: float = 0.0625


class LearnedEdit(NamedTuple):
    """The change of each layer after `steps` updates, and what it does by language.

    `before` and `after` are -log P of the target in nats; `is_greedy` says whether the target is the greedy answer.
    """

    deltas: dict[int, NeuronDelta]
    before: dict[str, float]
    after: dict[str, float]
    is_greedy: dict[str, bool]
    steps: int


class TargetScore(NamedTuple):
    """-log P of a target in nats, and whether each of its tokens is the argmax."""

    nll: Float[Tensor, ""]
    is_greedy: bool


def learn_edit(
    model: PreTrainedModel,
    texts: Mapping[str, EditText],
    neutral_prompts: Sequence[EditText],
    neurons: Neurons,
    norms: Float[Tensor, " L"],
    config: FactEditConfig,
) -> LearnedEdit:
    """The edit of one fact, whose `texts` are by language; `norms` are the norms of all activations of each layer.

    No weight gets a gradient. A neutral prompt has no target: its `start` is its length.
    """
    neutral_prompts = neutral_prompts if config.neutral_weight else ()
    scales = {layer: float(norms[layer]) / math.sqrt(len(ids)) for layer, ids in neurons.items() if len(ids)}
    theta = {layer: torch.zeros(len(neurons[layer]), device=model.device, requires_grad=True) for layer in scales}
    optimizer = torch.optim.Adam(theta.values(), lr=config.learning_rate)
    with eval_mode(model), torch.enable_grad():
        batch = _TextBatch(model, [*texts.values(), *neutral_prompts])
        with torch.no_grad():
            logits = batch.read({})
        before = [score_target(*pair) for pair in batch.list_targets(logits)[: len(texts)]]
        references = [log_softmax(row[-1], -1) for row, _ in batch.list_targets(logits)[len(texts) :]]
        for step in range(config.steps + 1):
            deltas = {layer: NeuronDelta(neurons[layer], scales[layer] * theta[layer]) for layer in theta}
            pairs = batch.list_targets(batch.read(deltas))
            scores = [score_target(*pair) for pair in pairs[: len(texts)]]
            if step == config.steps or all(score.is_greedy for score in scores):
                break
            loss = torch.stack([score.nll for score in scores]).sum()
            for (row, _), reference in zip(pairs[len(texts) :], references, strict=True):
                divergence = kl_div(log_softmax(row[-1], -1), reference, log_target=True, reduction="sum")
                loss = loss + config.neutral_weight * divergence
            gradients = torch.autograd.grad(loss, list(theta.values()))
            for values, gradient in zip(theta.values(), gradients, strict=True):
                values.grad = gradient
            optimizer.step()
            clamp_norms(list(theta.values()), config.clamp)
    return LearnedEdit(
        deltas={layer: NeuronDelta(ids, values.detach()) for layer, (ids, values) in deltas.items()},
        before={language: score.nll.item() for language, score in zip(texts, before, strict=True)},
        after={language: score.nll.item() for language, score in zip(texts, scores, strict=True)},
        is_greedy={language: score.is_greedy for language, score in zip(texts, scores, strict=True)},
        steps=step,
    )


def score_target(logits: Float[Tensor, "T V"], targets: Int64[Tensor, " T"]) -> TargetScore:
    """The score of a target, whose T tokens `logits` predict."""
    return TargetScore(cross_entropy(logits, targets, reduction="sum"), bool((logits.argmax(-1) == targets).all()))


@torch.no_grad()
def clamp_norms(theta: Sequence[Float[Tensor, " _"]], clamp: float) -> None:
    """Shrinks each theta in place until ||theta|| <= clamp sqrt(N), which is ||delta|| <= clamp ||a||."""
    for values in theta:
        limit = clamp * math.sqrt(len(values))
        values.mul_((limit / values.norm().clamp(min=1e-12)).clamp(max=1.0))


class _TextBatch:
    """Texts that are read again and again with other edits; the tokens before all edited ones are read once.

    A model whose cache cannot continue with several tokens reads the whole texts each time.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[EditText]) -> None:
        self.model, self.texts = model, texts
        self.ids = pad_texts([text.ids for text in texts], device=model.device)
        self.first, self.cache = 0, None
        self._read_prefix(min(text.position for text in texts))

    def read(self, deltas: Mapping[int, NeuronDelta]) -> Float[Tensor, "B T V"]:
        """The float32 logits after the token `first` and all later ones, with an edit at the position of each text."""
        cache: Any = copy.deepcopy(self.cache)  # a pass appends to it
        options = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        edits = [[PlacedEdit(text.position - self.first, deltas)] for text in self.texts]
        with apply_edits(self.model, edits):
            logits: Tensor = self.model(input_ids=self.ids[:, self.first :], **options).logits
        return logits.float()

    def list_targets(self, logits: Float[Tensor, "B T V"]) -> list[tuple[Tensor, Tensor]]:
        """For each text the logits that predict its target, and the target; without one, the logits after its end."""
        pairs = []
        for row, text in zip(logits, self.texts, strict=True):
            target = torch.tensor(list(text.ids[text.start :]), device=logits.device)
            start = text.start - 1 - self.first
            pairs.append((row[start : start + max(len(target), 1)], target))
        return pairs

    @torch.no_grad()
    def _read_prefix(self, length: int) -> None:
        """Reads the first `length` tokens of all texts, if that changes no logits."""
        if length == 0:
            return
        logits = self._read_targets()
        outputs = self.model(input_ids=self.ids[:, :length], use_cache=True)
        self.first, self.cache = length, getattr(outputs, "past_key_values", None)
        if self.cache is None or not self._matches(logits):
            self.first, self.cache = 0, None

    def _read_targets(self) -> Float[Tensor, "N V"]:
        return torch.cat([logits for logits, _ in self.list_targets(self.read({}))])

    def _matches(self, logits: Tensor) -> bool:
        try:
            return is_close(self._read_targets(), logits)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
            return False
