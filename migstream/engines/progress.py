"""What a running engine tells: one report a pass over memory, and where it stands meanwhile.

An engine calls a `Progress`: `begin` before a pass, `advance` after every batch, `end` behind it. The base
class keeps silent; `JsonProgress` writes a line a pass, `TerminalProgress` draws a bar.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = [
    "JsonProgress",
    "PassKind",
    "PassLog",
    "PassReport",
    "PassStart",
    "Progress",
    "TerminalProgress",
    "show",
]

#: ``memory``: a guest that stands still, or a receiver's view; ``precopy`` and ``stop-and-copy``: live;
#: ``checkpoint``: a further state of a checkpointed stream; ``verify``: pages sent to be compared.
PassKind = Literal["memory", "precopy", "stop-and-copy", "checkpoint", "verify"]


@dataclass(frozen=True)
class PassStart:
    """A pass that begins. ``pages`` is how many there are to do, ``None`` where that is not known.

    ``dirty_rate`` is in octets a second; ``downtime_s`` is how long the guest would stand still if these
    pages were the last.
    """

    kind: PassKind
    number: int
    pages: int | None
    dirty_rate: float | None = None
    downtime_s: float | None = None


@dataclass(frozen=True)
class PassReport:
    """A pass that was completed: ``pages`` entries, ``octets`` on the wire, ``seconds``; numbered from 0."""

    kind: PassKind
    number: int
    pages: int
    octets: int
    seconds: float
    dirty_rate: float | None = None
    downtime_s: float | None = None

    @property
    def bandwidth(self) -> float | None:
        """Octets a second, ``None`` for a pass too short to time."""
        return self.octets / self.seconds if self.seconds > 0 else None

    def to_json(self) -> dict[str, object]:
        """Return the fields and ``bandwidth``; unknown ones are ``None``."""
        return {**asdict(self), "bandwidth": self.bandwidth}


class Progress:
    """Hears of an engine's passes, and says nothing."""

    def begin(self, start: PassStart) -> None:
        """Tell that a pass begins."""

    def advance(self, pages: int, octets: int) -> None:
        """Tell that ``pages`` more entries, ``octets`` on the wire, are done."""

    def end(self, report: PassReport) -> None:
        """Tell that the pass is complete."""


class PassLog(Progress):
    """Keeps the reports of passes in ``reports``, and hands everything on to ``inner``."""

    def __init__(self, inner: Progress) -> None:
        self.reports: list[PassReport] = []
        self._inner = inner

    def begin(self, start: PassStart) -> None:
        """Hand it on."""
        self._inner.begin(start)

    def advance(self, pages: int, octets: int) -> None:
        """Hand it on."""
        self._inner.advance(pages, octets)

    def end(self, report: PassReport) -> None:
        """Keep the report, and hand it on."""
        self.reports.append(report)
        self._inner.end(report)


class JsonProgress(Progress):
    """One JSON object a line and pass, with ``event`` set to ``pass``."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def end(self, report: PassReport) -> None:
        """Write the report."""
        print(json.dumps({"event": "pass", **report.to_json()}), file=self._out, flush=True)


class TerminalProgress(Progress):
    """A bar on a terminal: pass, pages left, MB/s, dirty rate, estimated downtime."""

    def __init__(self, display: RichProgress) -> None:
        self._display = display
        self._task = display.add_task("", total=None, rate="", outlook="")
        self._left: int | None = None
        self._start_s = self._octets = 0.0

    def begin(self, start: PassStart) -> None:
        """Start the bar anew."""
        self._left = start.pages
        self._octets = 0
        self._start_s = self._display.get_time()
        outlook = []
        if start.dirty_rate is not None:
            outlook.append(f"dirtied {_rate(start.dirty_rate)}")
        if start.downtime_s is not None:
            outlook.append(f"downtime ~{_duration(start.downtime_s)}")
        self._display.reset(self._task, total=start.pages)
        self._display.update(
            self._task, description=f"{start.kind} {start.number}", rate="", outlook=", ".join(outlook)
        )

    def advance(self, pages: int, octets: int) -> None:
        """Move the bar."""
        self._octets += octets
        seconds = self._display.get_time() - self._start_s
        rate = _rate(self._octets / seconds) if seconds > 0 else ""
        if self._left is not None:
            self._left -= pages
            rate = f"{self._left} pages left, {rate}"
        self._display.update(self._task, advance=pages, rate=rate)

    def end(self, report: PassReport) -> None:
        """Leave a line about the pass, except for checkpoints, of which there may be many a second."""
        if report.kind == "checkpoint":
            return
        rate = f", {_rate(report.bandwidth)}" if report.bandwidth else ""
        line = f"{report.kind} {report.number}: {report.pages} pages in {_duration(report.seconds)}{rate}"
        self._display.console.print(line, highlight=False)


def _rate(octets_per_s: float) -> str:
    return f"{octets_per_s / 1e6:,.0f} MB/s"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


@contextmanager
def show(out: TextIO, *, as_json: bool = False) -> Iterator[Progress]:
    """Choose how progress is shown on ``out``: JSON lines, a bar on a terminal, else nothing."""
    if as_json:
        yield JsonProgress(out)
    elif out.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
        outlook = TextColumn("{task.fields[outlook]}")
        with RichProgress(*columns, outlook, console=Console(file=out), transient=True) as display:
            yield TerminalProgress(display)
    else:
        yield Progress()
