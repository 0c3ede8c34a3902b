"""Hugging Face's trainer for a `TrainingModule`. It has no code for any particular objective."""

import math
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from potstill.core.errors import ArtifactError, TrainingDiverged
from potstill.core.types import STEP, Batch
from potstill.data.packing import collate
from potstill.models.embedding_noise import make_noise
from potstill.train import checkpoint
from potstill.train.early_stopping import find_best_step, find_loss_explosion
from potstill.train.evaluation import iterate_eval_batches, sum_terms
from potstill.train.fsdp import gather, load_weights, save_whole_states
from potstill.train.lora import copy_adapter_weights, get_adapter_weights
from potstill.train.optimizer import drop_resting_gradients, parameter_groups, prepare_gradients
from potstill.train.rollouts.base import StatefulRollout, StepRollout
from potstill.train.rollouts.repeat_sampler import RepeatSampler
from potstill.train.rollouts.steps import AnyRollout, pop_metrics, roll_out_step
from potstill.train.training_module import TrainingModule

OBJECTIVE_FILE = "objective.safetensors"
ADAPTERS_FILE = "adapters.safetensors"
STUDENT_FILE = "student.safetensors"  # of a student that is no model of Hugging Face
ROLLOUT_FILE = "rollout-{}.safetensors"  # one for each rank


class Trainer(transformers.Trainer):
    """Trains a `TrainingModule`.

    Before the first forward of a step, it counts each term over all micro-batches and ranks. So it divides every loss
    by the same counts for any split of a step into passes.
    """

    loss_is_scaled_for_ga = True
    model: TrainingModule
    _staging_folder: Path | None = None  # where a checkpoint is written before it is moved to its place

    def __init__(
        self,
        module: TrainingModule,
        args: TrainingArguments,
        *,
        run_id: str = "",
        keep_best: bool = False,
        keep_checkpoints: int = checkpoint.MIN_CHECKPOINTS,
        neftune: float = 0.0,
        rollout: AnyRollout | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(module, args, data_collator=collate, **kwargs)
        for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
            self.remove_callback(callback)  # train/callbacks.py has its own
        self.run_id = run_id
        self.keep_best = keep_best  # whether to keep the checkpoint of the best evaluation beside the newest ones
        self.keep_checkpoints = keep_checkpoints
        self.neftune = neftune  # alpha of the noise on the student's embeddings
        self.rollout = rollout
        self.is_sharded = isinstance(module, FSDPModule)
        if self.is_sharded:
            vars(module)["_is_accelerate_prepared"] = True  # else accelerate would wrap the sharded module in DDP
        self._sums = torch.zeros(len(module.term_names), dtype=torch.float64)
        self._counts = torch.zeros_like(self._sums)
        self._num_passes = 0  # that the sums are of
        self._batches: list[Any] = []  # the batches of the current step, for error messages

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of a step and their counts; a rollout has replaced its documents in them."""
        batches = list(islice(epoch_iterator, num_batches))
        if self.rollout is not None and batches:
            seed, step, rank = self.args.seed, self.state.global_step, self.args.process_index
            batches = roll_out_step(self.rollout, batches, self.training_module, seed=seed, step=step, rank=rank)
        return super().get_batch_samples(map(self._add_step, batches), num_batches, device)

    def _add_step(self, batch: Batch) -> Batch:
        """The batch with the number of its step, and with the noise of its documents in that step."""
        batch = {**batch, STEP: torch.tensor(self.state.global_step)}
        return {**batch, **make_noise(batch, alpha=self.neftune, seed=self.args.seed)}

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The order of the packs; a rollout of steps gets whole steps, each as often in a row as it is trained on."""
        if not isinstance(self.rollout, StepRollout):
            return super()._get_train_sampler(train_dataset)
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return RepeatSampler(
            len(dataset),
            size=size,
            repeats=self.rollout.updates,
            seed=self.args.seed,
            get_epoch=lambda: int(self.state.epoch or 0),
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        self._batches = batch_samples
        counts = torch.stack([self.training_module.counts(batch) for batch in batch_samples]).sum(0).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return counts

    @property
    def training_module(self) -> TrainingModule:
        """The training module without any wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The loss of one micro-batch. Adds the sums of its terms to those for the log.

        Raises: TrainingDiverged if the loss is not finite.
        """
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not torch.isfinite(loss):
            self._raise_divergence(f"the loss became {loss.item()}", [inputs])
        self._sums += outputs["sums"].detach().double().cpu()
        self._counts += self.training_module.counts(inputs)
        self._num_passes += 1
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> Any:
        self._drop_resting_gradients()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self._drop_resting_gradients()  # here too, since a run without clipping does not call `_clip_grad_norm`
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not math.isfinite(norm):  # checked before the optimizer step, so the weights stay good
            self._raise_divergence(f"the gradient's norm became {float(norm)}", self._batches)
        return norm

    def _drop_resting_gradients(self) -> None:
        assert self.optimizer is not None
        drop_resting_gradients(self.optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the mean of each term since the last line.

        Raises: TrainingDiverged if the loss has exploded (see `find_loss_explosion`). The value of a policy gradient
            grows with the lengths of samples, and says nothing of divergence.
        """
        has_step_loss = "loss" in logs and self._num_passes > 0
        super().log(
            logs | self._compute_term_means() | pop_metrics(self.rollout) if has_step_loss else logs, start_time
        )
        is_policy_gradient = isinstance(self.rollout, StepRollout)
        if (
            has_step_loss
            and not is_policy_gradient
            and (median_loss := find_loss_explosion(self.state.log_history)) is not None
        ):
            self._raise_divergence(
                f"the loss rose from {median_loss:.3g} to {logs['loss']:.3g}", self._batches, step_done=True
            )

    def _raise_divergence(self, reason: str, batches: list[Any], *, step_done: bool = False) -> None:
        step = self.state.global_step + (not step_done)
        openings = " and ".join(self._describe_opening(batch) for batch in batches[:2])
        suffix = f" and {len(batches) - 2} more" if len(batches) > 2 else ""
        raise TrainingDiverged(
            f"{reason} at step {step}, on the batch that begins with {openings}{suffix}; lower the learning rate, "
            f"or check that text"
        )

    def _describe_opening(self, batch: Any) -> str:
        ids = batch["input_ids"].flatten()[:16].tolist()
        return repr(self.processing_class.decode(ids)) if self.processing_class else f"the tokens {ids}"

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that Hugging Face's arguments name, over our groups of parameters."""
        if self.optimizer is None:
            wrapped_model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, wrapped_model)
            module = self.accelerator.unwrap_model(wrapped_model)
            rate, decay = self.args.learning_rate, self.args.weight_decay
            groups = parameter_groups(module.student, module.objective, rate=rate, weight_decay=decay)
            self.optimizer: torch.optim.Optimizer | None = optimizer_class(groups, **options)
            self.optimizer.register_step_pre_hook(prepare_gradients)
            if self.is_sharded:
                save_whole_states(self.optimizer)
        return self.optimizer

    def _compute_term_means(self) -> dict[str, float]:
        totals = torch.stack([self._sums, self._counts]).to(self.args.device)
        if self.args.world_size > 1:
            totals = self.accelerator.gather(totals[None]).sum(0)
        self._sums, self._counts, self._num_passes = torch.zeros_like(self._sums), torch.zeros_like(self._counts), 0
        return {k: s / max(n, 1) for k, s, n in zip(self.training_module.term_names, *totals.tolist(), strict=True)}

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`eval_loss` and `eval_<term>`: the sums over all rows, divided once; or what the rollout measures."""
        module, mode = self.training_module, self.training_module.training
        module.eval()
        if isinstance(self.rollout, StepRollout):
            with module.autocast(self.args.device):
                measures = self.rollout.evaluate(module.student)
        else:
            measures = self._compute_eval_means(self.eval_dataset if eval_dataset is None else eval_dataset)
        module.train(mode)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measures.items()}
        if isinstance(self.rollout, StatefulRollout):
            self.rollout.on_evaluate(measures["loss"])
        self.log(metrics)
        self.control: transformers.TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _compute_eval_means(self, dataset: Any) -> dict[str, float]:
        """The means of all terms over the rows of a data set, and their weighted sum, the `loss`."""
        module = self.training_module
        batches = iterate_eval_batches(dataset, self.args, self._prepare_inputs, is_sharded=self.is_sharded)
        sums, counts = sum_terms(module, batches)
        if self.args.world_size > 1:
            sums, counts = self.accelerator.reduce(torch.stack([sums, counts]).to(self.args.device)).cpu()
        means = dict(zip(module.term_names, (sums / counts.clamp(min=1)).tolist(), strict=True))
        return {**means, "loss": float(sum(w * means[name] for name, w in module.objective.weights.items()))}

    def restore(self, folder: Path, state: TrainerState) -> None:
        """Load weights, objective and progress from a checkpoint, without training."""
        self._load_from_checkpoint(str(folder))
        self.state: TrainerState = state

    def restore_best(self) -> None:
        """Load the weights of the best evaluation.

        Raises: ArtifactError if its checkpoint is damaged.
        """
        folder = Path(self.args.output_dir) / self._get_best_checkpoint_name()
        if fault := checkpoint.find_fault(folder, run_id=self.run_id, world_size=self.args.world_size):
            raise ArtifactError(f"the checkpoint of the best evaluation cannot be read: {fault}; start again")
        self._load_from_checkpoint(str(folder))

    def _get_best_checkpoint_name(self) -> str:
        return checkpoint.get_checkpoint_name(find_best_step(self.state.log_history) or self.state.global_step)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_folder = Path(self.args.output_dir)
        staging_folder = run_folder / f".{checkpoint.get_checkpoint_name(self.state.global_step)}.partial"
        if self.args.should_save:
            shutil.rmtree(staging_folder, ignore_errors=True)  # left by a process that was killed while saving
        self.accelerator.wait_for_everyone()
        self._staging_folder = staging_folder
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each rank has written its own random state
            if self.args.should_save:
                staged_folder = staging_folder / checkpoint.get_checkpoint_name(self.state.global_step)
                best_name = self._get_best_checkpoint_name() if self.keep_best else ""
                checkpoint.seal_checkpoint(
                    staged_folder,
                    run_folder,
                    run_id=self.run_id,
                    world_size=self.args.world_size,
                    keep=self.keep_checkpoints,
                    protected_name=best_name,
                )
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
            raise ArtifactError(
                f"the checkpoint of step {self.state.global_step} could not be written to {run_folder} ({error}); "
                f"free disk space or fix the permissions there, then continue from the last checkpoint with --resume"
            ) from error
        finally:
            self._staging_folder = None
            if self.args.should_save:
                shutil.rmtree(staging_folder, ignore_errors=True)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging_folder or self.args.output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves student and objective on rank 0; all ranks have to call it, since sharded weights are gathered."""
        student_weights = gather(self.training_module.student.state_dict(keep_vars=True)) if self.is_sharded else None
        objective_state = gather(_get_objective_state(self.training_module))
        if self.args.should_save:
            self._save(output_dir, student_weights)
            if objective_state:
                save_file(objective_state, Path(output_dir or self.args.output_dir) / OBJECTIVE_FILE)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder, student = Path(output_dir or self.args.output_dir), self.training_module.student
        adapter_weights = get_adapter_weights(student)
        folder.mkdir(parents=True, exist_ok=True)
        if adapter_weights is not None:
            save_file({name: weight.detach() for name, weight in adapter_weights.items()}, folder / ADAPTERS_FILE)
        elif isinstance(student, PreTrainedModel):
            student.save_pretrained(folder, state_dict=state_dict)
        else:
            save_file(dict(student.state_dict() if state_dict is None else state_dict), folder / STUDENT_FILE)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_sharded and not self.args.should_save:
            assert self.optimizer is not None
            self.optimizer.state_dict()  # joins the gathers of rank 0
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.rollout, StatefulRollout):
            save_file(self.rollout.state_dict(), Path(output_dir) / ROLLOUT_FILE.format(self.args.process_index))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, module = Path(resume_from_checkpoint), self.training_module
        adapter_weights = get_adapter_weights(module.student)
        if adapter_weights is not None:
            copy_adapter_weights(adapter_weights, load_file(folder / ADAPTERS_FILE))
        elif isinstance(module.student, PreTrainedModel):
            saved_model = type(module.student).from_pretrained(folder, dtype=module.student.dtype)
            load_weights(module.student, saved_model.state_dict())
        else:
            load_weights(module.student, load_file(folder / STUDENT_FILE))
        if _get_objective_state(module):
            load_weights(module.objective, load_file(folder / OBJECTIVE_FILE))  # type: ignore[arg-type]
        if isinstance(self.rollout, StatefulRollout):
            self.rollout.load_state_dict(load_file(folder / ROLLOUT_FILE.format(self.args.process_index)))


def _get_objective_state(module: TrainingModule) -> dict[str, Tensor]:
    objective = module.objective
    return dict(objective.state_dict()) if isinstance(objective, torch.nn.Module) else {}
