"""The one trainer: Hugging Face's, training a `Study`, knowing no method."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainingArguments

from potstill.core.errors import TrainingDiverged
from potstill.data.pack import collate
from potstill.train import checkpoint
from potstill.train.settings import Settings
from potstill.train.study import Study

OBJECTIVE_FILE = "objective.safetensors"


class Trainer(transformers.Trainer):
    """Trains a `Study`: counts each term over all micro-batches and ranks before any forward, and only then divides."""

    loss_is_scaled_for_ga = True
    model: Study
    _staging: Path | None = None  # where a checkpoint is written before it is sealed

    def __init__(self, study: Study, args: TrainingArguments, *, identity: str = "", **kwargs: Any) -> None:
        super().__init__(study, args, data_collator=collate, **kwargs)
        self.identity = identity
        self._sums = torch.zeros(len(study.term_names), dtype=torch.float64)
        self._counts = torch.zeros_like(self._sums)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        counts = torch.stack([self.study.counts(batch) for batch in batch_samples]).sum(0).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return counts

    @property
    def study(self) -> Study:
        """The study itself, below any wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The loss of one micro-batch; keeps the sums of each term for the log.

        Raises: TrainingDiverged on a loss that is not finite.
        """
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not torch.isfinite(loss):
            raise TrainingDiverged(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}, on the batch that begins with the "
                f"tokens {inputs['input_ids'].flatten()[:8].tolist()}; lower the learning rate, or look at that text"
            )
        self._sums += outputs["sums"].detach().double().cpu()
        self._counts += self.study.counts(inputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each term since the last line to the log."""
        if "loss" in logs and self._counts.any():
            logs |= self._means()
        super().log(logs, start_time)

    def _means(self) -> dict[str, float]:
        both = torch.stack([self._sums, self._counts]).to(self.args.device)
        if self.args.world_size > 1:
            both = self.accelerator.gather(both[None]).sum(0)
        self._sums, self._counts = torch.zeros_like(self._sums), torch.zeros_like(self._counts)
        return {k: s / max(n, 1) for k, s, n in zip(self.study.term_names, *both.tolist(), strict=True)}

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sum over all evaluation rows, divided once: `eval_loss` and `eval_<term>`."""
        study = self.study
        sums, counts = torch.zeros_like(self._sums), torch.zeros_like(self._counts)
        study.eval()
        for batch in self.get_eval_dataloader(eval_dataset):
            batch = self._prepare_inputs(batch)
            sums = sums + study(**batch)["sums"].double().cpu()
            counts = counts + study.counts(batch)
        study.train()
        means = sums / counts.clamp(min=1)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in zip(study.term_names, means.tolist(), strict=True)}
        loss = sum(w * metrics[f"{metric_key_prefix}_{k}"] for k, w in study.objective.weights.items())
        metrics[f"{metric_key_prefix}_loss"] = float(loss)
        self.log(metrics)
        self.control: transformers.TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self.args.output_dir)
        staging = run / f".{checkpoint.name_of(self.state.global_step)}.partial"
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                checkpoint.seal(staging / checkpoint.name_of(self.state.global_step), run, study=self.identity)
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        self.study.student.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if trained := _own_state(self.study):
            save_file(trained, folder / OBJECTIVE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, study = Path(resume_from_checkpoint), self.study
        fresh = type(study.student).from_pretrained(folder, dtype=study.student.dtype)
        study.student.load_state_dict(fresh.state_dict(), strict=True)
        if _own_state(study):
            study.objective.load_state_dict(load_file(folder / OBJECTIVE_FILE), strict=True)  # type: ignore[attr-defined]


def _own_state(study: Study) -> dict[str, Tensor]:
    objective = study.objective
    return dict(objective.state_dict()) if isinstance(objective, torch.nn.Module) else {}


def arguments(settings: Settings, out: Path, *, device: str = "cpu", ranks: int = 1) -> TrainingArguments:
    """Hugging Face's arguments for these settings."""
    steps = settings.steps(ranks)
    return TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=settings.packs_per_pass,
        per_device_eval_batch_size=settings.packs_per_pass,
        gradient_accumulation_steps=settings.accumulation(ranks),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.final_rate},
        warmup_steps=math.ceil(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=settings.clip,
        seed=settings.seed,
        data_seed=settings.seed,
        eval_strategy="steps" if settings.eval_every else "no",
        eval_steps=settings.eval_every or None,
        save_strategy="steps",
        save_steps=settings.save_every or max(10, steps // 10),
        save_total_limit=None,  # checkpoint.seal keeps the newest two
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        include_num_input_tokens_seen="all",
        report_to=list(settings.report_to),
        disable_tqdm=True,
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,
    )
