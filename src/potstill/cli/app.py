"""`potstill`: one program, one verb a job. Nothing heavy is imported before a verb runs, so help is quick."""

import contextlib
import json
import math
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NoReturn

import typer
import typer.main

from potstill import __version__
from potstill.cli import options as o
from potstill.core.errors import Interrupted, PotstillError, UsageError

ClickException: Any = typer.BadParameter.__mro__[2]  # of whichever click this typer stands on
STOPPED = 130

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Makes language models small and fast: a teacher and a budget go in, a small, measured student comes out.",
)


def main() -> None:
    """The entry point: what goes wrong is one sentence on stderr and an exit code, `--debug` shows the traceback."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if len(arguments) < len(sys.argv) - 1:
        sys.exit(call(arguments))
    warnings.simplefilter("ignore")  # of the libraries below; what matters is an error here
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be ended is to be interrupted: things are cleared up
    try:
        sys.exit(call(arguments))
    except KeyboardInterrupt:
        say("stopped; nothing half-written was left behind", code=STOPPED)
    except Interrupted as error:
        say(f"{error}: {again(arguments)}", code=error.exit_code)
    except PotstillError as error:
        say(f"error: {error}", code=error.exit_code)
    except ClickException as error:
        verb = error.ctx.command_path if error.ctx else "potstill"
        say(f"error: {error.format_message().rstrip('.')} (see {verb} --help)", code=error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever reads us has seen enough
        sys.exit(1)
    except MemoryError:
        say("error: there is not enough memory; ask for a smaller --context or model", code=1)
    except Exception as error:  # the last boundary: a traceback helps only who asks for it
        say(f"error: {type(error).__name__}: {error} (--debug shows where)", code=1)


def call(arguments: Sequence[str]) -> int:
    """Runs the verb and prints what it answers, as JSON if that was asked for; the exit code.

    With `--json`, whatever else is printed below goes to stderr.
    """
    as_json = "--json" in arguments
    elsewhere = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    command = typer.main.get_command(app)
    try:
        with command.make_context("potstill", list(arguments) or ["--help"]) as context, elsewhere:
            found = context.command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    if as_json:
        json.dump(plain(found), sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
        print()
    return 0


def say(text: str, *, code: int) -> NoReturn:
    """One line on stderr, and out."""
    print(" ".join(text.split()), file=sys.stderr)
    sys.exit(code)


def again(arguments: Sequence[str]) -> str:
    """The command that continues this one."""
    kept = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    return shlex.join(["potstill", *kept, "--resume"])


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: a number that is not finite becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def answer(value: Any, as_json: bool, show: Callable[[], None]) -> Any:
    """What a verb returns: `value` for JSON; for people, `show` is called and nothing is left to say."""
    if as_json:
        return value
    show()
    return None


def hush() -> None:
    """The libraries' own bars and warnings stay away."""
    import datasets

    from potstill.train.run import quiet

    quiet()
    datasets.disable_progress_bars()


def show_version(asked: bool) -> bool:
    """Prints the version and stops, if it was asked for."""
    if asked:
        print(__version__)
        raise typer.Exit
    return asked


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """Makes language models small and fast."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@app.command()
def models(as_json: o.Json = False) -> Any:
    """What can be used offline here; hub ids, folders and GGUF files work everywhere.

    Example: [bold]potstill models[/]
    """
    from potstill.cli import show
    from potstill.models.available import available

    found = available()
    return answer(found, as_json, lambda: show.models(found))


@app.command()
def data(
    name: Annotated[str, typer.Argument(metavar="DATA", help="stdlib, a file, a folder, or a hub data set id.")],
    show_tokens: Annotated[bool, typer.Option("--show", help="Show which tokens are trained, coloured.")] = False,
    tokenizer: Annotated[str, typer.Option(help="The model whose tokenizer reads the text.")] = "smollm2",
    context: o.Context = 512,
    split: Annotated[str, typer.Option(help="train, validation or all.")] = "train",
    columns: o.Columns = "",
    as_json: o.Json = False,
) -> Any:
    """What a data set is, and which of its tokens are trained.

    Example: [bold]potstill data stdlib --show[/]
    """
    from potstill.cli import show
    from potstill.pipeline.texts import described

    hush()
    found = described(name, tokenizer, context=context, split=split, columns=columns)
    return answer(found, as_json, lambda: show.corpus(found, tokens=show_tokens))


@app.command()
def distill(
    context_of_call: o.Call,
    out: o.Out,
    teacher: o.Teacher = None,
    student: Annotated[str | None, typer.Option(help="A smaller model with the teacher's tokenizer.")] = None,
    keep: o.Keep = None,
    params: o.Params = None,
    strategy: o.Strategy = "auto",
    data: o.Data = "stdlib",
    columns: o.Columns = "",
    teacher_cache: Annotated[
        str | None, typer.Option(help="Learn from what `potstill cache` wrote, not from the live teacher.")
    ] = None,
    objective: Annotated[str, typer.Option(help=o.OBJECTIVES)] = "forward_kl",
    cross_entropy: Annotated[float, typer.Option(help="Share of cross-entropy in the loss, 0 to 1.")] = 0.7,
    temperature: Annotated[float, typer.Option(help="Both logits are divided by it; the loss times its square.")] = 1.0,
    tokens: o.Tokens = "200k",
    context: o.Context = 512,
    batch_tokens: o.BatchTokens = 2048,
    lr: o.LearningRate = 5e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps over which the rate rises.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Decay of matrices, per step and rate.")] = 0.01,
    micro_tokens: o.MicroTokens = 2048,
    documents: Annotated[int, typer.Option(help="Held-out documents to measure on.")] = 100,
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
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> Any:
    """Distil a teacher into a smaller student, and measure both.

    Example: [bold]potstill distill --teacher smollm2 --keep 0.75 --data stdlib --tokens 200k --out student[/]
    """
    from potstill.cli import show
    from potstill.pipeline.distill import Distill
    from potstill.train.settings import Settings

    hush()
    settings = o.types(Settings)
    stage = Distill.from_options(o.merge(context_of_call, config, settings))
    if dry_run:
        return answer(stage.to_dict(), as_json, lambda: show.facts(stage.to_dict()))
    run = stage.run(o.path(out), overwrite=overwrite, resume=resume, show=sys.stderr.isatty())
    return answer(run.to_dict(), as_json, lambda: show.run(run.out, run.measures))


@app.command()
def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder, a .gguf file or smollm2.")],
    out: o.Out,
    keep: o.Keep = None,
    params: o.Params = None,
    strategy: o.Strategy = "auto",
    layers: Annotated[int | None, typer.Option(help="Exact number of layers.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Exact number of key/value heads.")] = None,
    ffn: Annotated[int | None, typer.Option(help="Exact number of feed-forward neurons.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Exact hidden size.")] = None,
    layers_by: Annotated[str, typer.Option(help="Which layers go: by harm (measured) or evenly.")] = "harm",
    data: o.Data = "stdlib",
    columns: o.Columns = "",
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 1,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> Any:
    """Cut a model to a size; it stays of its family, and the logits are compared after a reload.

    Example: [bold]potstill prune smollm2 --keep 0.75 --data stdlib --out pruned[/]
    """
    from potstill.cli import show
    from potstill.pipeline.prune import Prune

    hush()
    exact = {"layers": layers, "kv_heads": kv_heads, "ffn": ffn, "hidden": hidden}
    stage = Prune(
        model=model,
        data=data,
        columns=columns,
        keep=keep,
        params=o.count(params),
        strategy=strategy,
        shape={k: v for k, v in exact.items() if v is not None},
        layers_by=layers_by,
        device=device,
        dtype=dtype,
        seed=seed,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    if dry_run:
        return answer(stage.to_dict(), as_json, lambda: show.facts(stage.to_dict()))
    card = stage.run(o.path(out), overwrite=overwrite)
    found = {"out": out, **card.to_dict()}
    return answer(found, as_json, lambda: show.pruned(out, card.details))


cache = typer.Typer(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
app.add_typer(cache, name="cache")


@cache.callback()
def capture(
    context_of_call: o.Call,
    out: Annotated[str | None, typer.Option(help="The folder to make.")] = None,
    teacher: o.Teacher = None,
    data: o.Data = "stdlib",
    columns: o.Columns = "",
    tokens: Annotated[str | None, typer.Option(help="How much of the data, such as 2M; by default all of it.")] = None,
    context: o.Context = 512,
    top_k: Annotated[int, typer.Option(help="Tokens kept of each distribution, the likeliest.")] = 64,
    mass: Annotated[float, typer.Option(help="Keep no more tokens than hold this share of the probability.")] = 1.0,
    classes: Annotated[int, typer.Option(help="Classes by which the mass of all others is kept; 1: as one.")] = 16,
    sampled: Annotated[int, typer.Option(help="Keep so many drawn tokens instead, for forward_kl alone.")] = 0,
    exact: Annotated[bool, typer.Option("--exact", help="Logarithms as float32 instead of 8 bits.")] = False,
    hidden: Annotated[bool, typer.Option("--hidden", help="Keep the last hidden states too, as bfloat16.")] = False,
    temperature: Annotated[float, typer.Option(help="The temperature that students will learn at.")] = 1.0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 1,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    dry_run: o.DryRun = False,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> Any:
    """Write down what a teacher says about a text, for any number of students.

    Example: [bold]potstill cache --teacher smollm2 --data stdlib --tokens 200k --out cached[/]
    """
    if context_of_call.invoked_subcommand is not None:
        return None
    from potstill.cli import show
    from potstill.pipeline.capture import Capture

    if out is None:
        raise UsageError("a folder is needed; give --out")
    if teacher is None:
        raise UsageError("a teacher is needed; give --teacher, such as smollm2")
    hush()
    stage = Capture(
        teacher=teacher,
        data=data,
        columns=columns,
        tokens=o.count(tokens),
        context=context,
        top_k=top_k,
        mass=mass,
        classes=classes,
        sampled=sampled,
        exact=exact,
        hidden=hidden,
        temperature=temperature,
        seed=seed,
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    if dry_run:
        return answer(stage.to_dict(), as_json, lambda: show.facts(stage.to_dict()))
    manifest = stage.run(o.path(out), overwrite=overwrite, resume=resume, show=sys.stderr.isatty())
    found = {"out": out, **manifest.to_dict()}
    return answer(found, as_json, lambda: show.caches([found]))


@cache.command()
def ls(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Caches, or folders that hold some.")],
    as_json: o.Json = False,
) -> Any:
    """The caches that lie there.

    Example: [bold]potstill cache ls .[/]
    """
    from potstill.cli import show
    from potstill.data.cache import Manifest, caches

    found = [{"out": str(one), **Manifest.read(one).to_dict()} for folder in folders for one in caches(o.path(folder))]
    return answer(found, as_json, lambda: show.caches(found))


@cache.command()
def verify(folder: Annotated[str, typer.Argument(metavar="DIR", help="A cache.")], as_json: o.Json = False) -> Any:
    """Compare every file of a cache with what its manifest says.

    Example: [bold]potstill cache verify cached[/]
    """
    from potstill.cli import show
    from potstill.core.errors import ArtefactError
    from potstill.data.cache import faults

    if found := list(faults(o.path(folder))):
        raise ArtefactError(f"{folder} is not whole: {', '.join(found)}; make it again")
    return answer({"out": folder, "whole": True}, as_json, lambda: show.said(f"{folder} is whole"))


@cache.command()
def rm(folder: Annotated[str, typer.Argument(metavar="DIR", help="A cache.")], as_json: o.Json = False) -> Any:
    """Remove a cache, and nothing that is none.

    Example: [bold]potstill cache rm cached[/]
    """
    from potstill.cli import show
    from potstill.data.cache import remove

    freed = remove(o.path(folder))
    return answer({"out": folder, "bytes": freed}, as_json, lambda: show.said(f"{folder} is gone, {freed:,} bytes"))


@app.command()
def measure(
    names: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models to measure side by side.")],
    data: o.Data = "stdlib",
    columns: o.Columns = "",
    teacher: o.OtherTeacher = None,
    split: Annotated[
        str, typer.Option(help="validation (5 % of a file, never trained on), train, or all: a file whole.")
    ] = "validation",
    documents: Annotated[int, typer.Option(help="Documents to read.")] = 100,
    context: o.Context = 512,
    prompts: Annotated[int, typer.Option(help="Prompts to answer for ROUGE-L, on prompt/response data.")] = 20,
    speed: Annotated[bool, typer.Option(help="Measure tokens/s and memory too.")] = True,
    tasks: o.Tasks = None,
    out: Annotated[str | None, typer.Option(help="Also write the measures to this JSON file.")] = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> Any:
    """Quality and cost of models, side by side, on held-out text.

    Example: [bold]potstill measure smollm2 student --teacher smollm2 --data stdlib[/]
    """
    from potstill.cli import show
    from potstill.pipeline.measure import Measurement

    hush()
    o.require_parent(out)
    stage = Measurement(
        models=tuple(names),
        data=data,
        columns=columns,
        split=split,
        teacher=teacher,
        documents=documents,
        context=context,
        prompts=prompts,
        speed=speed,
        tasks=tuple(tasks or ()),
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    found = stage.run(None if out is None else o.path(out))
    return answer(found, as_json, lambda: show.measures(found["models"], found["paired"]))


@app.command()
def frontier(
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Folders that potstill finished, or JSON of `measure --out`.")
    ],
    out: Annotated[str, typer.Option(help="The page; a PNG of the same name is written beside it.")] = "frontier.html",
    title: Annotated[str, typer.Option(help="The title of the chart.")] = "Quality against cost",
    as_json: o.Json = False,
) -> Any:
    """Every model on one chart of quality against cost, as one HTML page and a PNG.

    Example: [bold]potstill frontier student --out frontier.html[/]
    """
    from potstill.pipeline.frontier import draw_frontier

    o.require_parent(out)
    found = draw_frontier([o.path(folder) for folder in folders], o.path(out), title=title)
    return answer(found, as_json, lambda: print("\n".join(found["files"])))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder, a .gguf file or smollm2.")],
    prompt: Annotated[str, typer.Option(help="What to answer; '-' reads standard input.")],
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    raw: Annotated[bool, typer.Option(help="Continue the text as it is, without the chat template.")] = False,
    device: o.Device = "auto",
    seed: o.Seed = 1,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> Any:
    """Let a model write.

    Example: [bold]potstill generate smollm2 --prompt "What is a pot still?"[/]
    """
    from potstill.pipeline.generate import generate_text

    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens} must be at least 1")
    if not temperature >= 0:
        raise UsageError(f"--temperature {temperature} must be at least 0, which is greedy")
    hush()
    found = generate_text(
        model,
        sys.stdin.read() if prompt == "-" else prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        raw=raw,
        device=device,
        seed=seed,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    return answer(found, as_json, lambda: print(found["text"]))


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name that `potstill recipes` lists.")],
    out: o.Out,
    tiny: Annotated[bool, typer.Option("--tiny", help="The same method on a tiny budget.")] = False,
    teacher: Annotated[str | None, typer.Option(help="Another teacher than the recipe's.")] = None,
    data: Annotated[str | None, typer.Option(help="Other data than the recipe's.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Another budget, such as 2M.")] = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 1,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> Any:
    """Run a published system's recipe, stage by stage.

    Example: [bold]potstill run minima --tiny --out minima[/]
    """
    from potstill.cli import show
    from potstill.pipeline.run import run_stages
    from potstill.recipes import table

    hush()
    chosen = table.recipe(recipe, tiny=tiny).having(
        teacher=teacher, data=data, tokens=o.count(tokens), seed=seed, device=device, dtype=dtype
    )
    if dry_run:
        return answer(chosen.to_dict(), as_json, lambda: show.facts(chosen.to_dict()))
    result = run_stages(chosen.stages, o.path(out), overwrite=overwrite, resume=resume)
    return answer(result.to_dict(), as_json, lambda: show.run(result.out, result.measures))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show one recipe whole.")] = None,
    cite: Annotated[bool, typer.Option("--cite", help="Print the BibTeX of what it builds on.")] = False,
    as_json: o.Json = False,
) -> Any:
    """The published systems that potstill reproduces.

    Example: [bold]potstill recipes minima --cite[/]
    """
    from potstill.cli import show
    from potstill.recipes import table

    chosen = [table.recipe(name)] if name else table.recipes()
    found = [recipe.to_dict() for recipe in chosen]
    if cite:
        return answer(found, as_json, lambda: print("\n\n".join(dict.fromkeys(recipe.bibtex for recipe in chosen))))
    return answer(found, as_json, lambda: show.recipes(found, whole=name is not None))
