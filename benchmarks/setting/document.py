"""The command line of a benchmark, when it refuses, and the one JSON document that it prints."""

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


def command_line(says: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes; `says` is the script's docstring."""
    parser = argparse.ArgumentParser(description=says, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--unchecked", action="store_true", help="skip the tests; for development alone")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of a benchmark that can count seconds of the processor in place of the clock's."""
    parser.add_argument("--cpu-seconds", action="store_true", help="count seconds of the processor, on a busy machine")
    found = parser.parse_args()
    if found.cpu_seconds:
        time.perf_counter = time.process_time
    return found


def passed_on(options: argparse.Namespace, *names: str) -> list[str]:
    """The flags among `names` that are set, as a child is given them."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]


def refuse_on_red(tests: Sequence[str]) -> None:
    """Ends the process where one of `tests` fails: a benchmark of wrong code is worth nothing."""
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], stdout=sys.stderr)
    if ran.returncode:
        sys.exit("refused: a test that this benchmark rests on is red")


def machine() -> str:
    """What the figures were measured on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"


def document(
    name: str, figures: Mapping[str, Any], met: Mapping[str, bool], *, goals: Mapping[str, str] | None = None
) -> str:
    """The document; `goals` gives each goal's formula where its name does not say it."""
    found = {"name": name, "machine": machine(), "figures": figures, "goals": goals or list(met), "met": met}
    return json.dumps(found, indent=2)
