"""The package imports on systems that lack the modules of Linux."""

import pkgutil
import subprocess
import sys

import pytest

import potstill

BLOCKED = ("fcntl", "resource", "pwd", "grp", "termios", "pty")
CODE = """
import builtins, importlib, sys
import_module = builtins.__import__
def block(name, globals=None, *more, **options):  # in potstill alone: other packages ask for the system
    if name in {blocked} and str((globals or {{}}).get("__name__")).startswith("potstill"):
        raise ImportError(name)
    return import_module(name, globals, *more, **options)
builtins.__import__ = block
for name in {modules}:
    importlib.import_module(name)
import torch
from pathlib import Path
from potstill.core.memory import get_peak_memory, retain_freed_memory
from potstill.core.output_lock import output_lock
with retain_freed_memory(), output_lock(Path(sys.argv[1])):
    print(get_peak_memory(torch.device("cpu")))
"""


@pytest.mark.slow
def test_every_module_imports_without_the_modules_of_linux(tmp_path: object) -> None:
    names = [info.name for info in pkgutil.walk_packages(potstill.__path__, "potstill.") if "__main__" not in info.name]
    code = CODE.format(blocked=BLOCKED, modules=names)
    command = [sys.executable, "-W", "ignore", "-c", code, f"{tmp_path}/out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
