"""The class of all commands: it refuses a repeated option, and reads --config and names of Hugging Face."""

from collections import Counter
from typing import Any

from typer.core import TyperCommand, TyperGroup

from potstill.cli import options as o
from potstill.core.errors import UsageError
from potstill.core.hf_names import translate_name


class _StrictParsing:
    """What commands and groups of commands do with their arguments before typer reads them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse a repeated option, and set defaults from the file of `--config`. Raises: UsageError, NotFound."""
        command: Any = self
        options = {option.name: option for option in command.params if option.param_type_name == "option"}
        args = [_translate(argument, options) for argument in args]
        values, _, order = command.make_parser(ctx).parse_args(args=list(args))
        for option, count in Counter(option for option in order if option.name in options).items():
            if count > 1 and not option.multiple and not option.is_flag:
                raise UsageError(f"{option.opts[0]} is given {count} times; give it once")
        if config := values.get("config"):
            defaults = o.read_defaults(
                str(config), {option.name for option in command.params}, values, only_out=o.reads_config(command)
            )
            lists = {
                option.name for option in command.params if option.nargs == -1 or getattr(option, "multiple", False)
            }
            ctx.default_map = {
                name: [value] if name in lists and isinstance(value, str) else value for name, value in defaults.items()
            }
        return super().parse_args(ctx, args)  # type: ignore[misc]


class Command(_StrictParsing, TyperCommand):
    """A command."""


class CommandGroup(_StrictParsing, TyperGroup):
    """A command with further commands. A first word that is none of them is its `--teacher`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read `cache MODEL --own` as `cache --teacher MODEL --own`. Raises: UsageError, NotFound."""
        is_model = bool(args) and not args[0].startswith("-") and args[0] not in self.commands
        if is_model and all(argument.startswith("-") for argument in args[1:2]):
            args = ["--teacher", *args]
        return super().parse_args(ctx, args)


def _translate(argument: str, options: dict[str, Any]) -> str:
    """An option in our spelling, if it has a name of Hugging Face's trainers. Raises: UsageError."""
    if not argument.startswith("--") or argument == "--":
        return argument
    flag, equals, value = argument[2:].partition("=")
    name = flag.replace("-", "_")
    translated = translate_name(name, options)
    return argument if translated == name else f"--{translated.replace('_', '-')}{equals}{value}"
