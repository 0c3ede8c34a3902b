"""What mkdocs adds to the pages of docs: the pages of the repository's root, and a page of all commands.

A link from a page to a file of the repository that is no page becomes the file's path, since the site does not have the
file. A link to a file that does not exist stays, so that the strict build fails.
"""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"README.md": "index.md"} | {
    name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "LOG.md", "SECURITY.md")
}
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and the page of all commands."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference/commands.md", content=write_commands()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    sources = {page: source for source, page in ROOT_PAGES.items()}
    uri = page.file.src_uri
    source = sources.get(uri, f"docs/{uri}")

    def replace(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["target"]))
        site_path = ROOT_PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if files.get_file_from_path(site_path):
            relative = posixpath.relpath(site_path, posixpath.dirname(uri) or ".")
            return f"{match['text']}({relative}{match['anchor'] or ''})"
        if "://" in match["target"] or not (ROOT / path).exists():
            return match[0]
        return f"{match['text'].strip('[]')}, `{path}`"

    markdown = markdown.replace('<img src="docs/', '<img src="') if uri in sources else markdown
    return LINK.sub(replace, markdown)


def write_commands() -> str:
    """The page of all commands: what `potstill COMMAND --help` says, with a table of the options."""
    sys.path.insert(0, str(ROOT / "src"))
    import typer.main

    from potstill.cli.app import app

    group: Any = typer.main.get_command(app)
    intro = (
        "# Commands\n\nThis page has the help of every command. In Python, an option is a keyword argument of the same "
        "name, with `_` for `-`: see [Python](python.md)."
    )
    return "\n\n".join([intro, *(write_command(name, command) for name, command in group.commands.items())])


def write_command(name: str, command: Any) -> str:
    """The section of one command, or of a group of commands."""
    parts = [f"## {name}", re.sub(r"\[bold\](.+?)\[/\]", r"`\1`", command.help or "", flags=re.DOTALL)]
    rows = [write_option(p) for p in command.params if p.name not in ("help", "install_completion", "show_completion")]
    if rows:
        parts.append("\n".join(["| option | default | meaning |", "|---|---|---|", *rows]))
    parts += [write_command(f"{name} {key}", sub) for key, sub in getattr(command, "commands", {}).items()]
    return "\n\n".join(parts)


def write_option(parameter: Any) -> str:
    """The row of an option."""
    names = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        names = [parameter.metavar or parameter.name.upper()]
    default = f"`{parameter.default}`" if parameter.default not in (None, False, "") else ""
    text = re.sub(r"(?<!\\)\[/?[a-z]*\]", "", parameter.help or "").replace("\\[", "[").replace("|", r"\|")
    code = " ".join(f"`{name}`" for name in names)
    return f"| {code} | {'required' if parameter.required else default} | {text} |"
