"""The floors hold: import-linter checks who imports whom, and these tests check that it would find a breach."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "potstill"
FOR_OPS = {"torch", "triton", "fla", "jaxtyping", "potstill.ops"} | set(sys.stdlib_module_names)


# the command itself, with a copy of the source ahead of the installed package
LINT = "import sys; sys.path.insert(0, 'src'); from importlinter.cli import lint_imports_command as lint; lint()"


def lint(project: Path) -> subprocess.CompletedProcess[str]:
    """Runs the contracts of `project/pyproject.toml` over `project/src`."""
    command = [sys.executable, "-c", LINT, "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project's source and contracts, to be vandalised."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "src" / "potstill", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_each_floor_imports_only_from_below() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("where", "line"),
    [
        pytest.param("core/planted.py", "import potstill.models", id="core reaches up to models"),
        pytest.param("ops/planted.py", "from potstill import core", id="ops reaches across to core"),
        pytest.param("evaluate/planted.py", "import potstill.train", id="evaluate reaches across to train"),
        pytest.param("train/planted.py", "def late():\n    import potstill.recipes", id="train reaches up, lazily"),
        pytest.param("ops/planted.py", "import transformers", id="an op knows Hugging Face"),
        pytest.param("core/types.py", "import transformers", id="the shared types know Hugging Face"),
        pytest.param("utils/__init__.py", "", id="a package that stands on no floor"),
    ],
)
def test_a_planted_breach_is_found(copy: Path, where: str, line: str) -> None:
    planted = copy / "src" / "potstill" / where
    planted.parent.mkdir(exist_ok=True)
    with planted.open("a") as file:
        file.write(f"\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=lambda path: path.stem)
def test_ops_import_torch_and_nothing_else(path: Path) -> None:
    strangers = {name for name in imported(path) if not any(name == f or name.startswith(f + ".") for f in FOR_OPS)}
    assert not strangers


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports, at its top or anywhere below."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {
        f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
