"""Medusa: trains heads that draft the next tokens from a frozen target's last hidden states.

    potstill run medusa --teacher TARGET --data prompts.jsonl --out made
    potstill generate TARGET --draft medusa:made/2-medusa

Source: Cai et al., "Medusa" (arXiv:2401.10774), section 2.2.1 (Medusa-1). Departs from the paper: all heads share the
target's output layer, where each head of the paper trains a copy of it.
"""

import copy
from collections.abc import Mapping
from pathlib import Path

from potstill.core.atomic_files import atomic_folder
from potstill.core.card import BEFORE_TRAINING, Card
from potstill.core.device import SAVE_DTYPES
from potstill.core.screen import status
from potstill.decode.drafters.medusa import MedusaHeads
from potstill.evaluate.draft_matches import DraftMatches, match_heads
from potstill.evaluate.scoring_windows import ScoringConfig
from potstill.models.inference import get_max_context
from potstill.stages.console import explain_write_errors, get_command, print_note
from potstill.stages.medusa.config import MedusaConfig
from potstill.stages.medusa.prepare import MedusaRun, prepare
from potstill.stages.option_checks import check_single_process
from potstill.stages.publication import copy_logs, draw_loss_curve
from potstill.stages.run_folder import explain_interrupt, reserve_output, training_folder
from potstill.stages.run_record import RunRecord
from potstill.stages.stage import make_parent
from potstill.train.medusa import MedusaLoss, MedusaNetwork
from potstill.train.run import TrainResult, train
from potstill.train.training_module import TrainingModule


def train_medusa(config: MedusaConfig, out: Path, *, overwrite: bool = False, resume: bool = False) -> Card:
    """Train, measure and save the heads; `out` holds only `training/` until they are complete.

    Raises: UsageError, NotFound, DataError, UnsupportedModel, OutputExists before anything is written; Interrupted with
        checkpoints left for `resume`.
    """
    check_single_process()
    with reserve_output(out, config.inputs, overwrite=overwrite, resume=resume, options=config.to_dict()):
        run = prepare(config, out if resume else None)
        with (
            explain_write_errors(out),
            explain_interrupt(out),
            training_folder(out, run.record, overwrite=overwrite) as folder,
        ):
            before = measure_heads(run)
            result = train_heads(config, run, folder, title=out.name, resume=resume)
            run.heads.to(SAVE_DTYPES[config.save_dtype])
            card = make_card(config, run, result, {BEFORE_TRAINING: before, out.name: measure_heads(run)})
            with atomic_folder(out, overwrite=True) as staging_folder:
                run.heads.write(staging_folder)
                copy_logs(folder, staging_folder)
                draw_loss_curve(staging_folder, result)
                card.write(staging_folder)
    print_note(f"potstill generate {config.model} --draft {MedusaHeads.kind}:{out} drafts with these heads")
    return card


@status("measuring the heads")
def measure_heads(run: MedusaRun) -> DraftMatches:
    """The matches of the heads in the dtype of the target, in which `--draft` runs them."""
    model = run.target.model
    scoring = ScoringConfig(context=get_max_context(model), vocabulary=run.target.vocabulary)
    return match_heads(copy.deepcopy(run.heads).to(model.dtype), model, run.rows, scoring)


def train_heads(config: MedusaConfig, run: MedusaRun, folder: Path, *, title: str, resume: bool) -> TrainResult:
    """Train to the end, or raise KeyboardInterrupt once an interrupted run has saved its checkpoint."""
    module = TrainingModule(
        MedusaNetwork(run.heads, run.target.model),
        MedusaLoss(num_heads=config.num_heads, decay=config.decay),
        vocabulary=run.target.vocabulary,
        compute_dtype=run.dtype,
    )
    result = train(
        module,
        run.dataset.packs,
        config.settings,
        folder,
        tokenizer=run.target.tokenizer,
        validation=run.dataset.validation_packs,
        run_id=(RunRecord.from_folder(folder) or run.record).run_id,
        resume=resume,
        title=title,
    )
    if not result.finished:
        raise KeyboardInterrupt
    return result


def make_card(config: MedusaConfig, run: MedusaRun, result: TrainResult, matches: Mapping[str, DraftMatches]) -> Card:
    """The card of the heads, with their measures and accuracies before and after training."""
    return Card(
        stage=config.to_dict(),
        seed=config.settings.seed,
        parents=[make_parent("target", run.target)],
        data=run.dataset.facts,
        cost=result.to_dict(),
        measures={name: head_matches.measure(config.num_heads) for name, head_matches in matches.items()},
        details={"top_1_accuracy_by_head": {name: head_matches.shares for name, head_matches in matches.items()}},
        command=get_command(),
    )
