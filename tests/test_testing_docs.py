"""The examples of docs/testing.md and fuzz/README.md run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.build import image

ROOT = Path(__file__).parents[1]


def example(page: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    return str(found)


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_strategies_are_used_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(example("docs/testing.md"), "utf-8")
    assert "2 passed" in run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py")


def test_the_library_call_is_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "guest.image").write_bytes(image())
    code = example("fuzz/README.md") + "\nprint(mutation.steps[0])\n"
    assert run(tmp_path, "-c", code).startswith("corpus stream 0")
