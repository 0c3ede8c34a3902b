"""`potstill cache`: write down a teacher's outputs for any number of students."""

import sys
from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.core.errors import UsageError

cache_app = typer.Typer(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


@cache_app.callback()
def write_cache(
    ctx: o.CommandContext,
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
    hidden: Annotated[
        bool, typer.Option("--hidden", help="Keep the last hidden states too, as bfloat16: dskd, dskdv2, tie_kd ask.")
    ] = False,
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
    if ctx.invoked_subcommand is not None:
        return None
    from potstill.cli import tables
    from potstill.stages.cache_teacher import CacheTeacherConfig

    if out is None:
        raise UsageError("a folder is needed; give --out")
    suppress_library_output()
    stage = CacheTeacherConfig(
        teacher=o.get_single_teacher(teacher),
        data=data,
        columns=columns,
        tokens=o.parse_count(tokens),
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
        return print_or_return(stage.to_dict(), as_json, lambda: tables.print_facts(stage.to_dict()))
    manifest = stage.run(o.expand_path(out), overwrite=overwrite, resume=resume, show=sys.stderr.isatty())
    summary = {"out": out, **manifest.to_dict()}
    return print_or_return(summary, as_json, lambda: tables.print_caches([summary]))


@cache_app.command()
def ls(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Caches, or folders that hold some.")],
    as_json: o.Json = False,
) -> Any:
    """The caches that lie there.

    Example: [bold]potstill cache ls .[/]
    """
    from potstill.cli import tables
    from potstill.core.errors import ArtifactError
    from potstill.stages.console import print_note
    from potstill.teachers.cached import Manifest, list_caches

    rows = []
    for cache_folder in (cache_folder for folder in folders for cache_folder in list_caches(o.expand_path(folder))):
        try:
            rows.append({"out": str(cache_folder), **Manifest.from_folder(cache_folder).to_dict()})
        except ArtifactError as error:
            print_note(str(error))
    return print_or_return(rows, as_json, lambda: tables.print_caches(rows))


@cache_app.command()
def verify(folder: Annotated[str, typer.Argument(metavar="DIR", help="A cache.")], as_json: o.Json = False) -> Any:
    """Compare every file of a cache with what its manifest says.

    Example: [bold]potstill cache verify cached[/]
    """
    from potstill.cli import tables
    from potstill.core.errors import ArtifactError
    from potstill.teachers.cached import find_faults

    if damaged_files := list(find_faults(o.expand_path(folder))):
        raise ArtifactError(f"{folder} is not whole: {', '.join(damaged_files)}; make it again")
    return print_or_return({"out": folder, "whole": True}, as_json, lambda: tables.print_line(f"{folder} is whole"))


@cache_app.command()
def rm(folder: Annotated[str, typer.Argument(metavar="DIR", help="A cache.")], as_json: o.Json = False) -> Any:
    """Remove a cache, and nothing that is none.

    Example: [bold]potstill cache rm cached[/]
    """
    from potstill.cli import tables
    from potstill.teachers.cached import remove_cache

    freed_bytes = remove_cache(o.expand_path(folder))
    return print_or_return(
        {"out": folder, "bytes": freed_bytes},
        as_json,
        lambda: tables.print_line(f"{folder} is gone, {freed_bytes:,} bytes"),
    )
