"""How a campaign shows itself: a line on a terminal that moves, lines of text, or lines of JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from migstream.fuzzing.triage import DISAGREEMENT

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from migstream.fuzzing.findings import Finding
    from migstream.fuzzing.state import Known, State

__all__ = ["Display", "JsonDisplay", "TerminalDisplay", "TextDisplay", "show"]

STATUS_S = 5.0  # seconds between two status lines of JSON


class Display:
    """Hears of a campaign, and says nothing."""

    def note(self, text: str) -> None:
        """Tell something worth knowing."""

    def status(self, state: State) -> None:
        """Tell how far the campaign is."""

    def found(self, finding: Finding, out: Path) -> None:
        """Tell of a new finding, which was written below ``out``."""

    def minimised(self, finding: Finding, known: Known) -> None:
        """Tell that a finding's stream was made as small as it gets."""

    def minimising(self, count: int) -> None:
        """Tell that executions are over, and so many findings are still being minimised."""


class JsonDisplay(Display):
    """One JSON object a line: ``event`` is ``note``, ``status``, ``finding`` or ``minimised``."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._told = time.monotonic()

    def _print(self, event: str, **fields: object) -> None:
        print(json.dumps({"event": event, **fields}), file=self._out, flush=True)

    def note(self, text: str) -> None:
        """Write it."""
        self._print("note", text=text)

    def status(self, state: State) -> None:
        """Write the counts, every few seconds."""
        if time.monotonic() - self._told >= STATUS_S:
            self._told = time.monotonic()
            counts = {"outcomes": dict(state.outcomes), "findings": len(state.findings)}
            self._print("status", executions=state.next, seconds=round(state.seconds, 3), **counts)

    def found(self, finding: Finding, out: Path) -> None:
        """Write the finding."""
        self._print("finding", folder=str(out / finding.name), **finding.to_json())

    def minimised(self, finding: Finding, known: Known) -> None:
        """Write its new size."""
        self._print("minimised", **known.to_json())


class TextDisplay(Display):
    """A line for each finding, and for each that was minimised."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def note(self, text: str) -> None:
        """Write it."""
        self._print(f"note: {text}")

    def found(self, finding: Finding, out: Path) -> None:
        """Write what it is, and its folder."""
        self._print(f"execution {finding.number}: {finding.signature}\n  {out / finding.name}")

    def minimised(self, finding: Finding, known: Known) -> None:
        """Write its new size."""
        before = len(finding.original)
        records = f"{known.records} record{'s' * (known.records != 1)}"
        self._print(f"minimised {finding.name}: {before} octets to {known.octets}, {records}")


class TerminalDisplay(TextDisplay):
    """The same lines above one that moves: executions, how many a second, what came of them."""

    def __init__(self, display: RichProgress, out: TextIO) -> None:
        super().__init__(out)
        self._display = display
        self._task = display.add_task("starting", total=None)
        self._left = ""

    def _print(self, text: str) -> None:
        self._display.console.print(text, highlight=False, markup=False)

    def status(self, state: State) -> None:
        """Move the line."""
        self._display.update(self._task, description=status_line(state) + self._left)

    def minimising(self, count: int) -> None:
        """Say so behind the line."""
        self._left = f"; minimising {count}"


def status_line(state: State) -> str:
    """Return a campaign's counts in one line."""
    rate = f" ({state.next / state.seconds:,.0f}/s)" if state.seconds else ""
    counts = ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(state.outcomes.items()))
    disagreements = sum(
        known.hits for known in state.findings.values() if known.signature.kind == DISAGREEMENT
    )
    if disagreements:
        counts += f", {DISAGREEMENT} {disagreements:,}"
    return f"{state.next:,} executions{rate}: {counts}; {len(state.findings)} findings"


@contextmanager
def show(out: TextIO, *, as_json: bool = False) -> Iterator[Display]:
    """Choose how a campaign is shown on ``out``: JSON lines, a moving line on a terminal, else text."""
    if as_json:
        yield JsonDisplay(out)
    elif out.isatty():
        from rich.console import Console
        from rich.progress import Progress as RichProgress
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
        with RichProgress(*columns, console=Console(file=out), transient=True) as display:
            yield TerminalDisplay(display, out)
    else:
        yield TextDisplay(out)
