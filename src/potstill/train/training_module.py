"""The module that training optimizes: the student with its objective, and references to frozen teachers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.core.elastic import STUDENT, Size, is_student, name_student
from potstill.core.types import (
    DIVISOR,
    Batch,
    Needs,
    Objective,
    Signals,
    SignalSource,
    get_view,
    select_routed_documents,
)
from potstill.models.causality import is_causal, require_causal
from potstill.models.elastic import SizeView
from potstill.models.embedding_noise import select_noise
from potstill.models.signals import compute_signals


class TrainingModule(nn.Module):
    """Computes loss = sum over terms of weight * sum / count, from a student, an objective and frozen teachers.

    Backbone, fused head and projectors all run inside `forward`, so that DDP, FSDP, clipping and checkpoints see every
    parameter. Frozen models (teachers, references) are outside the module tree: they are never trained, saved or
    switched to train mode.

    With `sizes` the student is elastic, and the objective may need the network `student@0.5`, the size of that share.

    `vocabulary` is the number of real token ids, for all networks or by network name. It cuts off rows that pad a head
    to a round width. A frozen network with another tokenizer reads its own view of the batch. `compute_dtype` is the
    dtype of matrix products. The student's weights keep their dtype (float32 masters).
    """

    # Hugging Face's trainer passes `num_items_in_batch` only to models with this flag; a named argument is not enough.
    accepts_loss_kwargs = True

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        *,
        frozen: Mapping[str, PreTrainedModel | SignalSource] | None = None,
        vocabulary: int | Mapping[str, int] | None = None,
        compute_dtype: torch.dtype = torch.float32,
        sizes: Sequence[Size] = (),
    ) -> None:
        super().__init__()
        self.student: Any = student  # a Hugging Face causal language model, in peft's wrapper or without
        self.objective = objective
        self.vocabulary = vocabulary
        self.compute_dtype = compute_dtype
        self._signal_sources = {
            name: source for name, source in (frozen or {}).items() if not isinstance(source, nn.Module)
        }
        self._frozen_models = _UnregisteredModels(
            {k: source for k, source in (frozen or {}).items() if isinstance(source, nn.Module)}
        )
        self._size_views = {name_student(size.share): SizeView(self.student, size) for size in sizes[1:]}
        for model in self._frozen_models:
            model.eval().requires_grad_(False)
        for model in (student, *self._frozen_models):
            is_causal(model)  # probed now, before a wrapper or autocast gets in the way

    def with_student(self, student: nn.Module) -> "TrainingModule":
        """A module for another student without sizes, with the same objective, frozen models and sources."""
        return self._replace(student, self.objective, self.frozen_networks)

    def with_objective(self, objective: Objective) -> "TrainingModule":
        """A module for the same student without its sizes, and the same frozen models and sources."""
        return self._replace(self.student, objective, self.frozen_networks)

    def with_frozen(self, frozen: Mapping[str, PreTrainedModel | SignalSource]) -> "TrainingModule":
        """A module for the same student without its sizes, with other frozen models or sources of these names too."""
        return self._replace(self.student, self.objective, {**self.frozen_networks, **frozen})

    def _replace(
        self, student: nn.Module, objective: Objective, frozen: Mapping[str, PreTrainedModel | SignalSource]
    ) -> "TrainingModule":
        options: dict[str, Any] = {"vocabulary": self.vocabulary, "compute_dtype": self.compute_dtype}
        return TrainingModule(student, objective, frozen=frozen, **options)

    @property
    def frozen_networks(self) -> Mapping[str, PreTrainedModel | SignalSource]:
        """The frozen models and the sources of signals, by name."""
        return {**self.frozen_models_by_name, **self._signal_sources}

    @property
    def frozen_models(self) -> list[PreTrainedModel]:
        """The frozen models whose weights are loaded."""
        return list(self._frozen_models)

    @property
    def students(self) -> list[nn.Module]:
        """The student, and its smaller sizes as models of their own."""
        return [self.student, *(view.model for view in self._size_views.values())]

    @property
    def term_names(self) -> list[str]:
        """The terms in the order in which counts are passed to `forward`."""
        return list(self.objective.weights)

    def counts(self, batch: Batch) -> Tensor:
        """The number of summands of each term in `batch` [terms], in the order of `term_names`."""
        counts_by_name = self.objective.counts(batch)
        return torch.tensor([counts_by_name[name] for name in self.term_names])

    def forward(
        self,
        num_items_in_batch: Tensor | None = None,
        **batch: Tensor,
    ) -> dict[str, Tensor]:
        """`loss` (terms divided by `num_items_in_batch` [terms]) and the undivided `sums` [terms].

        Without `num_items_in_batch`, terms are divided by the counts of this batch alone.
        """
        counts = (self.counts(batch) if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        batch |= {f"{DIVISOR}.{name}": count for name, count in zip(self.term_names, counts, strict=True)}
        if "targets" not in batch:
            self._require_causal_networks()
        needs = self.objective.needs(batch)
        student_needs = {name: need for name, need in needs.items() if is_student(name)}
        frozen = self._compute_frozen_signals(batch, {k: need for k, need in needs.items() if k not in student_needs})
        student_batch, vocabulary = {**get_view(batch, STUDENT), **select_noise(batch)}, self._get_vocabulary(STUDENT)
        with self.autocast(batch["input_ids"].device):  # for the objective too: it multiplies the head
            views = {
                name: compute_signals(self._get_student(name), student_batch, need, vocabulary=vocabulary)
                for name, need in student_needs.items()
            }
            terms = self.objective(views, frozen, batch)
        sums = torch.stack([terms[name] for name in self.term_names])
        weights = torch.tensor(list(self.objective.weights.values()), dtype=sums.dtype, device=sums.device)
        loss = (weights * sums / counts.to(sums)).sum()
        return {"loss": loss, "sums": sums.detach()}

    def _get_student(self, name: str) -> nn.Module:
        """The student, or one of its smaller sizes with the student's present weights."""
        view = self._size_views.get(name)
        return self.student if view is None else view.update()

    def _require_causal_networks(self) -> None:
        """Refuse networks that see the next token, which a batch without `targets` predicts.

        Raises: UnsupportedModel.
        """
        for name, model in {"student": self.student, **self.frozen_models_by_name}.items():
            require_causal(model, f"the {name}")

    @torch.no_grad()
    def _compute_frozen_signals(self, batch: Batch, needs: Mapping[str, Needs]) -> dict[str, Signals]:
        frozen_signals = {}
        for name, need in needs.items():
            network_batch, need = select_routed_documents(get_view(batch, name), need)
            vocabulary = self._get_vocabulary(name)
            if not network_batch["input_ids"].numel():
                continue  # no position in this pass needs it
            if name in self._signal_sources:
                frozen_signals[name] = self._signal_sources[name].signals(network_batch, need, vocabulary=vocabulary)
                continue
            model = self._frozen_models[name].eval()  # whatever happened around it
            is_float32 = next(model.parameters()).dtype == torch.float32
            with self.autocast(batch["input_ids"].device) if is_float32 else nullcontext():
                frozen_signals[name] = compute_signals(model, network_batch, need, vocabulary=vocabulary)
        return frozen_signals

    def _get_vocabulary(self, name: str) -> int | None:
        return self.vocabulary.get(name) if isinstance(self.vocabulary, Mapping) else self.vocabulary

    @property
    def frozen_models_by_name(self) -> Mapping[str, PreTrainedModel]:
        """The frozen models whose weights are loaded, by name."""
        return self._frozen_models.models_by_name

    def autocast(self, device: torch.device) -> torch.autocast | nullcontext[None]:
        """A context in which matrices are multiplied in `compute_dtype`."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.compute_dtype)


class _UnregisteredModels:
    """Keeps models outside the module tree: `nn.Module` does not register the attributes of a plain object."""

    def __init__(self, models: Mapping[str, PreTrainedModel]) -> None:
        self.models_by_name = dict(models)

    def __getitem__(self, name: str) -> PreTrainedModel:
        return self.models_by_name[name]

    def __iter__(self) -> Iterator[PreTrainedModel]:
        return iter(self.models_by_name.values())
