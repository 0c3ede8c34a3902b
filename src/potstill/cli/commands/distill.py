"""`potstill distill`: train a student from a teacher."""

import sys
from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return, suppress_library_output


def distill(
    ctx: o.CommandContext,
    out: o.Out,
    teacher: o.Teachers = None,
    combine: o.Combine = "average",
    student: o.Student = None,
    keep: o.Keep = None,
    params: o.Params = None,
    strategy: o.Strategy = "auto",
    data: o.Data = "stdlib",
    columns: o.Columns = "",
    teacher_cache: Annotated[
        str | None, typer.Option(help="Learn from what `potstill cache` wrote, not from the live teacher.")
    ] = None,
    top_k: Annotated[
        int, typer.Option(help="Tokens of each distribution that a served teacher is asked for; vLLM gives 20.")
    ] = 20,
    objective: o.Objective = "forward_kl",
    cross_entropy: o.CrossEntropy = 0.7,
    temperature: o.Temperature = 1.0,
    on_policy: Annotated[
        float, typer.Option(help="Share of the documents that the student completes itself, 0 to 1.")
    ] = 0.0,
    rollout: Annotated[
        str, typer.Option(help="How those are chosen and written: gkd, distillm (grows, replays), minillm (mixed).")
    ] = "gkd",
    tokens: o.Tokens = "200k",
    context: o.Context = 512,
    batch_tokens: o.BatchTokens = 2048,
    lr: o.LearningRate = 5e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps over which the rate rises.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Decay of matrices, per step and rate.")] = 0.01,
    micro_tokens: o.MicroTokens = 2048,
    checkpoint_activations: o.CheckpointActivations = False,
    compile: o.Compile = False,
    shard: o.Shard = False,
    documents: o.Documents = 100,
    eval_data: o.EvalData = None,
    eval_every: o.EvalEvery = 0,
    save_every: o.SaveEvery = 0,
    patience: Annotated[int, typer.Option(help="Stop after so many evaluations without a better one; 0 is never.")] = 0,
    lora: Annotated[
        int, typer.Option(help="Rank of a LoRA adapter trained instead of all weights, merged at the end; 0 is none.")
    ] = 0,
    report_to: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb or trackio, beside metrics.jsonl; repeat for several.")
    ] = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 1,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    config: o.Config = None,
    dry_run: o.DryRun = False,
    skip_doctor: o.SkipDoctor = False,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> Any:
    """Distil a teacher into a smaller student, and measure both.

    Example: [bold]potstill distill --teacher smollm2 --keep 0.75 --data stdlib --tokens 200k --out student[/]

    Two teachers: [bold]potstill distill --teacher smollm2 --teacher own=pruned --student pruned --out student[/]
    """
    from potstill.cli import tables
    from potstill.stages.distill.config import DistillConfig
    from potstill.stages.distill.run import distill as run_distill
    from potstill.train.config import TrainConfig

    suppress_library_output()
    settings = o.get_number_types(TrainConfig)
    stage = DistillConfig.from_options(o.merge_options(ctx, config, settings))
    if dry_run:
        return print_or_return(stage.to_dict(), as_json, lambda: tables.print_facts(stage.to_dict()))
    result = run_distill(stage, o.expand_path(out), overwrite=overwrite, resume=resume, show=sys.stderr.isatty())
    return print_or_return(result.to_dict(), as_json, lambda: tables.print_run(result.out, result.measures))
