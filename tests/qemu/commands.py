"""The commands of migstream as processes: run beside a test, killed by it, looked for when they are gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tests.qemu.machine import wait_until

__all__ = ["Command", "Ended", "migstream", "receiving", "run"]

MIGSTREAM = [sys.executable, "-c", "from migstream.cli import main; main()"]


class Ended:
    """How a command ended: its exit code, and what it printed."""

    def __init__(self, code: int, out: str, errors: str) -> None:
        self.code = code
        self.out = out
        self.errors = errors

    def __repr__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.errors}"

    @property
    def result(self) -> dict[str, Any]:
        """The last object that ``--json`` printed."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


class Command:
    """A command that runs, in a session of its own, so that whatever it leaves behind is found."""

    def __init__(self, arguments: Sequence[str], out: IO[bytes], errors: IO[bytes]) -> None:
        self._out, self._errors = out, errors
        command = [*MIGSTREAM, *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, start_new_session=True
        )

    @property
    def out(self) -> str:
        """What it has printed to standard output so far."""
        return _content(self._out)

    @property
    def errors(self) -> str:
        """What it has printed to standard error so far."""
        return _content(self._errors)

    def wait(self, timeout_s: float = 60) -> Ended:
        """Wait until it ends. Raises `AssertionError` if a process of its stays behind."""
        code = self.process.wait(timeout_s)
        assert not self.left_behind(), self.left_behind()
        return Ended(code, self.out, self.errors)

    @property
    def ended(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.process.poll() is not None

    def left_behind(self) -> list[str]:
        """The processes of the command's session that still run."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # Behind the name in parentheses: state, parent, process group, session.
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append(f"{stat.parent.name} {(stat.parent / 'cmdline').read_bytes()!r}")
        return found

    def kill(self) -> None:
        """End it as a fault does: by SIGKILL, at once."""
        self.process.kill()

    def end(self) -> None:
        """End it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _content(file: IO[bytes]) -> str:
    return os.pread(file.fileno(), 1 << 20, 0).decode()


@contextlib.contextmanager
def migstream(*arguments: str) -> Iterator[Command]:
    """Run ``migstream ARGUMENTS`` beside the block."""
    # Files, not pipes: what is printed can be looked at meanwhile.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        command = Command(arguments, out, errors)
        try:
            yield command
        finally:
            command.end()


def run(*arguments: str) -> Ended:
    """Run ``migstream ARGUMENTS`` to its end."""
    with migstream(*arguments) as command:
        return command.wait()


@contextlib.contextmanager
def receiving(path: Path, qmp: Path, *options: str) -> Iterator[Command]:
    """Run ``migstream receive`` at the Unix socket ``path`` for the machine at ``qmp``; it listens."""
    with migstream("receive", f"unix:{path}", f"qemu:{qmp}", *options) as command:
        wait_until("migstream receive", lambda: "listening" in command.errors or command.ended)
        yield command
