"""The one trainer: Hugging Face's, training a `Study`, knowing no method."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import TrainerState, TrainingArguments

from potstill.core.errors import ArtefactError, TrainingDiverged
from potstill.data.pack import collate
from potstill.train import adapters, checkpoint
from potstill.train.optimiser import parameter_groups, rest, steer
from potstill.train.rollout import Remembering, Rollout, generator_of, summary
from potstill.train.settings import Settings
from potstill.train.study import Study
from potstill.train.watch import best_of, exploded_from

OBJECTIVE_FILE = "objective.safetensors"
ADAPTERS_FILE = "adapters.safetensors"
ROLLOUT_FILE = "rollout-{}.safetensors"  # of each rank


class Trainer(transformers.Trainer):
    """Trains a `Study`: counts each term over all micro-batches and ranks before any forward, and only then divides."""

    loss_is_scaled_for_ga = True
    model: Study
    _staging: Path | None = None  # where a checkpoint is written before it is sealed

    def __init__(
        self,
        study: Study,
        args: TrainingArguments,
        *,
        identity: str = "",
        keep_best: bool = False,
        rollout: Rollout | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(study, args, data_collator=collate, **kwargs)
        for unwanted in (transformers.PrinterCallback, transformers.ProgressCallback):
            self.remove_callback(unwanted)  # train/progress.py shows and records
        self.identity = identity
        self.keep_best = keep_best  # whether the checkpoint of the best evaluation outlives newer ones
        self.rollout = rollout
        self._sums = torch.zeros(len(study.term_names), dtype=torch.float64)
        self._counts = torch.zeros_like(self._sums)
        self._batches: list[Any] = []  # of the step in hand, to name them when it goes wrong

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of a step and their counts; with a rollout, as they are once it has written its part of them."""
        batches = epoch_iterator if self.rollout is None else self._rolled_out(epoch_iterator, self.rollout)
        return super().get_batch_samples(batches, num_batches, device)

    def _rolled_out(self, batches: Iterator[Any], rollout: Rollout) -> Iterator[Any]:
        """Each batch with what the rollout writes."""
        generator = generator_of(self.args.seed, self.state.global_step, self.args.process_index)
        study = self.study
        for batch in batches:  # not `yield from`, which would close the loader at the end of a step
            with torch.no_grad(), study.autocast(batch["input_ids"].device):
                rolled = rollout(batch, study.student, study.frozen, generator)
            yield rolled

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        self._batches = batch_samples
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
            self._stop(f"the loss became {loss.item()}", [inputs])
        self._sums += outputs["sums"].detach().double().cpu()
        self._counts += self.study.counts(inputs)
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> Any:
        self._let_rest()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self._let_rest()  # here too, since nothing may have been clipped
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(norm):  # checked before the optimiser steps, so no weight is ever spoilt
            self._stop(f"the gradient's norm became {float(norm)}", self._batches)
        return norm

    def _let_rest(self) -> None:
        assert self.optimizer is not None
        rest(self.optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each term since the last line to the log.

        Raises: TrainingDiverged if the loss has exploded (see `watch.exploded_from`).
        """
        stepped = "loss" in logs and bool(self._counts.any())
        super().log(logs | self._means() | self._written() if stepped else logs, start_time)
        if stepped and (before := exploded_from(self.state.log_history)) is not None:
            self._stop(f"the loss rose from {before:.3g} to {logs['loss']:.3g}", self._batches, done=True)

    def _stop(self, what: str, batches: list[Any], *, done: bool = False) -> None:
        step = self.state.global_step + (not done)
        openings = " and ".join(self._opening(batch) for batch in batches[:2])
        others = f" and {len(batches) - 2} more" if len(batches) > 2 else ""
        raise TrainingDiverged(
            f"{what} at step {step}, on the batch that begins with {openings}{others}; lower the learning rate, "
            f"or look at that text"
        )

    def _opening(self, batch: Any) -> str:
        ids = batch["input_ids"].flatten()[:16].tolist()
        return repr(self.processing_class.decode(ids)) if self.processing_class else f"the tokens {ids}"

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Hugging Face's choice of optimiser over named groups of parameters."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            study = self.accelerator.unwrap_model(trained)
            rate, decay = self.args.learning_rate, self.args.weight_decay
            groups = parameter_groups(study.student, study.objective, rate=rate, weight_decay=decay)
            self.optimizer: torch.optim.Optimizer | None = kind(groups, **options)
            self.optimizer.register_step_pre_hook(steer)
        return self.optimizer

    def _means(self) -> dict[str, float]:
        both = torch.stack([self._sums, self._counts]).to(self.args.device)
        if self.args.world_size > 1:
            both = self.accelerator.gather(both[None]).sum(0)
        self._sums, self._counts = torch.zeros_like(self._sums), torch.zeros_like(self._counts)
        return {k: s / max(n, 1) for k, s, n in zip(self.study.term_names, *both.tolist(), strict=True)}

    def _written(self) -> dict[str, int]:
        """What was rolled out since the last line, over all ranks."""
        if self.rollout is None:
            return {}
        tally = summary(self.rollout.tally)
        self.rollout.tally.clear()
        if self.args.world_size > 1:
            counted = self.accelerator.gather(torch.tensor([list(tally.values())], device=self.args.device)).sum(0)
            tally = dict(zip(tally, counted.tolist(), strict=True))
        return tally

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sum over all evaluation rows, divided once: `eval_loss` and `eval_<term>`."""
        study, mode = self.study, self.study.training
        sums, counts = torch.zeros_like(self._sums), torch.zeros_like(self._counts)
        study.eval()
        for batch in self._evaluation_batches(eval_dataset):
            sums += study(**batch)["sums"].double().cpu()
            counts += study.counts(batch)
        study.train(mode)
        if self.args.world_size > 1:
            sums, counts = self.accelerator.reduce(torch.stack([sums, counts]).to(self.args.device)).cpu()
        means = sums / counts.clamp(min=1)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in zip(study.term_names, means.tolist(), strict=True)}
        loss = sum(w * metrics[f"{metric_key_prefix}_{k}"] for k, w in study.objective.weights.items())
        metrics[f"{metric_key_prefix}_loss"] = float(loss)
        if isinstance(self.rollout, Remembering):
            self.rollout.evaluated(float(loss))
        self.log(metrics)
        self.control: transformers.TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _evaluation_batches(self, rows: Any) -> Iterator[dict[str, Tensor]]:
        """This rank's share of the rows, none twice: accelerate's loader repeats rows until every rank has as many."""
        rows = self.eval_dataset if rows is None else rows
        mine = Subset(rows, range(self.args.process_index, len(rows), self.args.world_size))
        for batch in DataLoader(mine, self.args.per_device_eval_batch_size, collate_fn=collate):
            yield self._prepare_inputs(batch)

    def restore(self, folder: Path, state: TrainerState) -> None:
        """Take weights, objective and progress from a checkpoint, without training any further."""
        self._load_from_checkpoint(str(folder))
        self.state: TrainerState = state

    def restore_best(self) -> None:
        """Take the weights of the best evaluation.

        Raises: ArtefactError if its checkpoint does not verify.
        """
        folder = Path(self.args.output_dir) / self._best()
        if fault := checkpoint.fault_of(folder, study=self.identity, ranks=self.args.world_size):
            raise ArtefactError(f"the weights of the best evaluation cannot be read: {fault}; start again")
        self._load_from_checkpoint(str(folder))

    def _best(self) -> str:
        return checkpoint.name_of(best_of(self.state.log_history) or self.state.global_step)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self.args.output_dir)
        staging = run / f".{checkpoint.name_of(self.state.global_step)}.partial"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed while it saved
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each rank writes its own random state
            if self.args.should_save:
                staged = staging / checkpoint.name_of(self.state.global_step)
                best = self._best() if self.keep_best else ""
                checkpoint.seal(staged, run, study=self.identity, ranks=self.args.world_size, spare=best)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save says a full disk with a RuntimeError
            raise ArtefactError(
                f"the checkpoint of step {self.state.global_step} could not be written to {run} ({error}); make room "
                f"or give permission there, then continue from the one before it with --resume"
            ) from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        adapted = adapters.trained(self.study.student)
        if adapted is None:
            self.study.student.save_pretrained(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: weight.detach() for name, weight in adapted.items()}, folder / ADAPTERS_FILE)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if trained := _own_state(self.study):
            save_file(trained, folder / OBJECTIVE_FILE)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.rollout, Remembering):
            save_file(self.rollout.state_dict(), Path(output_dir) / ROLLOUT_FILE.format(self.args.process_index))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, study = Path(resume_from_checkpoint), self.study
        if adapters.trained(study.student) is None:
            fresh = type(study.student).from_pretrained(folder, dtype=study.student.dtype)
            study.student.load_state_dict(fresh.state_dict(), strict=True)
        else:
            _fill(adapters.trained(study.student) or {}, load_file(folder / ADAPTERS_FILE))
        if _own_state(study):
            study.objective.load_state_dict(load_file(folder / OBJECTIVE_FILE), strict=True)  # type: ignore[attr-defined]
        if isinstance(self.rollout, Remembering):
            self.rollout.load_state_dict(load_file(folder / ROLLOUT_FILE.format(self.args.process_index)))


def _fill(weights: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    if weights.keys() != saved.keys():
        raise ArtefactError(f"the checkpoint's adapters are not this run's: {sorted(weights.keys() ^ saved.keys())[0]}")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])


def _own_state(study: Study) -> dict[str, Tensor]:
    objective = study.objective
    return dict(objective.state_dict()) if isinstance(objective, torch.nn.Module) else {}


def arguments(settings: Settings, out: Path, *, device: str = "cpu", ranks: int = 1) -> TrainingArguments:
    """Hugging Face's arguments for these settings."""
    steps, packs = settings.steps, settings.packs_per_pass(ranks)
    chosen = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=packs,
        per_device_eval_batch_size=packs,
        gradient_accumulation_steps=settings.accumulation(ranks),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.final_rate},
        warmup_steps=math.ceil(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        optim="adamw_torch_fused",
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
        label_names=["labels"],
        average_tokens_across_devices=True,
        include_num_input_tokens_seen="all",
        ddp_find_unused_parameters=False,  # every weight of a study is in its loss; to look for others costs time
        report_to=list(settings.report_to),
        disable_tqdm=True,
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,
    )
    chosen._n_gpu = min(1, chosen.n_gpu)  # several GPUs in one process would be split by DataParallel, rows and counts
    return chosen
