"""What a user installs is the wheel, not this checkout: it is built, installed elsewhere, imported and run."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout with the build tools of this environment, so without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    (built,) = folder.glob("potstill-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target))
    run(*pip, str(wheel), cwd=target)
    return target


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    """Runs a command outside the checkout; its output, or a failure that shows it."""
    environment = {**os.environ, "PYTHONPATH": str(path) if path else ""}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_module_its_types_and_its_licence_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    source = ROOT / "src"
    files = {path for path in (source / "potstill").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == {str(path.relative_to(source)) for path in files}
    assert "potstill/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_the_installed_copy_is_the_one_that_is_imported(installed: Path, tmp_path: Path) -> None:
    origin = run(sys.executable, "-c", "import potstill; print(potstill.__file__)", cwd=tmp_path, path=installed)
    assert Path(origin.strip()).is_relative_to(installed)


def test_every_module_of_the_installed_copy_imports(installed: Path, tmp_path: Path) -> None:
    program = (
        "import importlib, pkgutil, potstill\n"
        "for module in pkgutil.walk_packages(potstill.__path__, 'potstill.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
    )
    run(sys.executable, "-c", program, cwd=tmp_path, path=installed)


def test_the_installed_command_answers_help(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "potstill"
    shown = run(sys.executable, str(command), "--help", cwd=tmp_path, path=installed)
    assert "potstill" in shown
