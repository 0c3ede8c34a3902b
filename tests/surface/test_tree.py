"""What is in the repository: nothing large, and nothing that a tool left behind."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LARGEST = 2**18  # bytes; docs/demo.png is the largest picture, and 100 kB


def test_no_tracked_file_is_large() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    assert files
    assert not [file.name for file in files if file.exists() and file.stat().st_size > LARGEST]
