"""The README's library examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.build import image

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, check=True, text=True, timeout=60
    )
    return done.stdout


def test_reading_a_stream(tmp_path: Path) -> None:
    # The example names an xl file; a bare image is read the same way.
    (tmp_path / "guest.xl").write_bytes(image())
    shown = run(EXAMPLES[0], tmp_path)
    assert "[0 1 5] [ 0  0 14]" in shown
    assert "X86TscInfo(mode=1, khz=2000000, nsec=77, incarnation=3, reserved1=0)" in shown


def test_the_engines_move_a_busy_guest_in_under_twenty_lines(tmp_path: Path) -> None:
    assert run(EXAMPLES[1], tmp_path).rstrip().endswith("True")
    assert len(EXAMPLES[1].splitlines()) < 20
