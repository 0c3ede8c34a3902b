"""The command line of a benchmark, the tests that it depends on, and the JSON document that it prints."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; `description` is the script's docstring."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--unchecked", action="store_true", help="skip the tests; for development only")
    return parser


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the arguments of a benchmark that can count processor time instead of wall time."""
    parser.add_argument("--cpu-seconds", action="store_true", help="count processor time, on a busy machine")
    options = parser.parse_args()
    if options.cpu_seconds:
        time.perf_counter = time.process_time
    return options


def forward_flags(options: argparse.Namespace, *names: str) -> list[str]:
    """The flags among `names` that are set, as arguments for a child process."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]


def refuse_on_red(tests: Sequence[str]) -> None:
    """Ends the process if one of `tests` fails: figures of wrong code mean nothing."""
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], stdout=sys.stderr)
    if result.returncode:
        sys.exit("refused: a test that this benchmark depends on fails")


def describe_machine() -> str:
    """The machine that the figures were measured on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"


def document(
    name: str, figures: Mapping[str, Any], met: Mapping[str, bool], *, goals: Mapping[str, str] | None = None
) -> str:
    """The JSON document; `goals` gives each goal's formula where its name does not."""
    options = {"name": name, "machine": describe_machine(), "figures": figures, "goals": goals or list(met), "met": met}
    return json.dumps(options, indent=2)
