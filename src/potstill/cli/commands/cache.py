"""`potstill cache`: store a teacher's outputs on disk, for any number of students."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.command_class import CommandGroup
from potstill.cli.dry_run import show_dry_run
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.core.errors import UsageError
from potstill.stages.options import CacheTeacherOptions

cache_app = typer.Typer(
    cls=CommandGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


@cache_app.callback()
@o.add_screen_options
@o.add_config_option
@o.take_options(CacheTeacherOptions)
def write_cache(
    ctx: o.CommandContext,
    out: Annotated[str | None, typer.Option(help="The folder to write; it must not exist, or be empty.")] = None,
    teacher: o.Teacher = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Store a teacher's log-probabilities for a data set, so that students train without running the teacher.

    Example: [bold]potstill cache --teacher smollm2 --data stdlib --tokens 200k --out cached[/]

    A reference of align: [bold]potstill cache smollm2 --own --data preferences.jsonl --out reference[/]
    """
    if ctx.invoked_subcommand is not None:
        return None
    from potstill.cli import tables
    from potstill.stages.cache_teacher import CacheTeacherConfig

    if out is None:
        raise UsageError("no output folder is given; give --out, such as --out cached")
    suppress_library_output()
    stage = CacheTeacherConfig(teacher=o.get_single_teacher(teacher), **o.read_options(CacheTeacherOptions, options))
    if dry_run:
        from potstill.stages.dry_run import preview_cache

        report = preview_cache(stage, o.expand_path(out), overwrite=overwrite, resume=resume)
        return show_dry_run("cache", report, {"teacher": stage.teacher, **options}, out=out, as_json=as_json)
    manifest = stage.run(o.expand_path(out), overwrite=overwrite, resume=resume)
    summary = {"out": out, **manifest.to_dict()}
    return print_or_return(summary, as_json, lambda: tables.print_caches([summary]))


@cache_app.command()
@o.add_screen_options
def ls(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Caches, or folders that contain caches.")],
    as_json: o.Json = False,
) -> Any:
    """List the caches in one or more folders.

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
@o.add_screen_options
def verify(folder: Annotated[str, typer.Argument(metavar="DIR", help="A cache.")], as_json: o.Json = False) -> Any:
    """Compare every file of a cache with its manifest.

    Example: [bold]potstill cache verify cached[/]
    """
    from potstill.cli import tables
    from potstill.core.errors import ArtifactError
    from potstill.teachers.cached import find_faults

    if damaged_files := list(find_faults(o.expand_path(folder))):
        raise ArtifactError(f"{folder} is damaged: {', '.join(damaged_files)}; write it again with potstill cache")
    return print_or_return({"out": folder, "whole": True}, as_json, lambda: tables.print_line(f"{folder} is complete"))


@cache_app.command()
@o.add_screen_options
def rm(folder: Annotated[str, typer.Argument(metavar="DIR", help="A cache.")], as_json: o.Json = False) -> Any:
    """Delete a cache; refuse a folder that is not one.

    Example: [bold]potstill cache rm cached[/]
    """
    from potstill.cli import tables
    from potstill.core.output_lock import output_lock
    from potstill.teachers.cached import remove_cache

    path = o.expand_path(folder)
    with output_lock(path):
        freed_bytes = remove_cache(path)
    return print_or_return(
        {"out": folder, "bytes": freed_bytes},
        as_json,
        lambda: tables.print_line(f"deleted {folder} and freed {freed_bytes:,} bytes"),
    )
