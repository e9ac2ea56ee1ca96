"""What makes two findings the same: how the run ended, and what it said, without what varies.

A signature has a title (the signal, the exception, a sanitizer's kind of error) and a few lines on where:
the innermost frames of a traceback or of a sanitizer's report, else the last lines of output. Numbers,
addresses and directories vary from one stream, run or machine to the next, so they are left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Self

from migstream.fuzzing.target import Execution, Outcome
from migstream.text import decode, printable

__all__ = ["DISAGREEMENT", "Signature", "last_lines", "normalised", "python_frames", "signature_of"]

FRAMES = 3  # innermost frames that count
LINES = 2  # last lines of output that count where there are no frames
LINE_LENGTH = 160

#: The class of a finding that is none of the outcomes: migstream and the target judge differently.
DISAGREEMENT = "disagreement"

_VARIABLE = (
    (re.compile(r"\b0[xX][0-9a-fA-F]+\b"), "#"),
    (re.compile(r"\bb(?:'[^']*'|\"[^\"]*\")"), "b'#'"),  # octets, as Python shows them
    (re.compile(r"(?<![\w.])(?:/[\w.+@-]+)+/([\w.+@-]+)"), r"\1"),  # a path's directories
    (re.compile(r"(?<!\w)[0-9][0-9a-fA-F]{7,}\b"), "#"),
    (re.compile(r"(?<!\w)\d+"), "#"),  # but not those in a name, such as vcpu64
    (re.compile(r"\s+"), " "),
)

_TRACEBACK = "Traceback (most recent call last):"
_PYTHON_FRAME = re.compile(r'^\s*File "(.*)", line \d+, in (.*)$')
_EXCEPTION = re.compile(r"^([A-Za-z_][\w.]*)(?::.*)?$")
_SANITIZER = re.compile(r"==\d+==\s?ERROR: (\w+Sanitizer): ([\w-]+)")
_SANITIZER_FRAME = re.compile(r"^\s*#\d+ 0x[0-9a-f]+ in (\S+) (\S+?)(?::\d+)*(?:\s.*)?$")
_RUNTIME_ERROR = re.compile(r"^(\S+?):\d+:\d+: runtime error: (.*)$", re.MULTILINE)  # UBSan
_SANITIZERS_OWN = re.compile(r"^(__asan|__interceptor|__sanitizer|__libc|_start$|mem\w{3,4}$|str\w+$)")


@dataclass(frozen=True)
class Signature:
    """What findings have in common. ``kind`` is an outcome's name or ``disagreement``."""

    kind: str
    title: str
    where: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Ten hexadecimal digits that stand for it."""
        text = "\n".join((self.kind, self.title, *self.where))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:10]

    @property
    def name(self) -> str:
        """The name of its finding's folder: ``crash-SIGSEGV-0123456789``."""
        title = re.sub(r"[^A-Za-z0-9]+", "-", self.title).strip("-")[:40]
        return f"{self.kind}-{title}-{self.key}" if title else f"{self.kind}-{self.key}"

    def __str__(self) -> str:
        return f"{self.kind} {self.title}" + (f" at {' < '.join(self.where[:2])}" if self.where else "")

    def to_json(self) -> dict[str, object]:
        """Return kind, title, where and key."""
        return {"kind": self.kind, "title": self.title, "where": list(self.where), "key": self.key}

    @classmethod
    def from_json(cls, fields: dict[str, object]) -> Self:
        """Make a signature of `to_json`'s fields."""
        where = fields["where"]
        return cls(str(fields["kind"]), str(fields["title"]), tuple(where) if isinstance(where, list) else ())


def normalised(line: str, stream_path: str = "") -> str:
    """Return a line of output without what varies, safe to show; ``{}`` stands for the stream's path."""
    if stream_path:
        line = line.replace(stream_path, "{}")
    for pattern, instead in _VARIABLE:
        line = pattern.sub(instead, line)
    return printable(line.strip())[:LINE_LENGTH]


def signature_of(execution: Execution, stream_path: str = "") -> Signature | None:
    """Return the signature of a crash, a hang or a want of memory; ``None`` for accept and refuse."""
    if execution.outcome in (Outcome.ACCEPT, Outcome.REFUSE):
        return None
    text = decode(execution.output)
    if execution.outcome is Outcome.HANG:
        # How far its output came is chance, so all that go round in a circle are taken for one.
        return Signature("hang", "busy" if execution.busy else "waiting")
    for reading in (python_frames, _sanitizer, _runtime_error):
        found = reading(text)
        if found is not None:
            return Signature(str(execution.outcome), *found)
    return Signature(str(execution.outcome), execution.ending, last_lines(text, stream_path))


def last_lines(text: str, stream_path: str, count: int = LINES) -> tuple[str, ...]:
    """Return the last lines of output that say something, the last one first, without what varies."""
    lines = [line for line in text.splitlines() if line.strip()]
    return tuple(normalised(line, stream_path) for line in reversed(lines[-count:]))


def python_frames(text: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the exception and the innermost frames of the last traceback, with the statement that raised."""
    if _TRACEBACK not in text:
        return None
    lines = text[text.rindex(_TRACEBACK) :].splitlines()
    frames: list[str] = []
    statement = ""
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if match := _PYTHON_FRAME.match(line):
            frames.append(f"{PurePath(match[1]).name}:{match[2]}")
            statement = after.strip() if after.startswith("    ") else ""
    said = (match[1] for line in lines[1:] if (match := _EXCEPTION.match(line)))
    return next(said, "Traceback"), _innermost(reversed_frames=frames[::-1], statement=statement)


def _innermost(*, reversed_frames: Sequence[str], statement: str) -> tuple[str, ...]:
    frames = list(dict.fromkeys(reversed_frames))[:FRAMES]  # a recursion counts once
    if frames and statement:
        frames[0] += f" ({printable(statement)[:LINE_LENGTH]})"
    return tuple(frames)


def _sanitizer(text: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the kind of error and the innermost frames of the program, its own only."""
    report = _SANITIZER.search(text)
    if report is None:
        return None
    frames: list[str] = []
    for line in text[report.end() :].splitlines():
        match = _SANITIZER_FRAME.match(line)
        if match is None and frames:
            break  # the first stack only: the others say where memory was taken or freed
        if match is not None and not _SANITIZERS_OWN.match(match[1]):
            frames.append(f"{PurePath(match[2]).name}:{match[1]}")
    return report[2], _innermost(reversed_frames=frames, statement="")


def _runtime_error(text: str) -> tuple[str, tuple[str, ...]] | None:
    match = _RUNTIME_ERROR.search(text)
    return match and ("runtime error", (f"{PurePath(match[1]).name}: {normalised(match[2])}",))
