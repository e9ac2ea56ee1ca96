"""The program that is fuzzed: run once on one stream, under limits, and what came of it.

Nothing of Python runs between fork and exec: `os.posix_spawn` starts the program in a session of its own.
Its limit on memory has to be there before it is, so a shell sets that and becomes the program, by exec; this
costs half a millisecond. The shell sees nothing of the arguments' text. The other limits come from the parent
through prlimit, where it does not matter that they are a moment late. Output goes to a file in memory, not to
a pipe: a program that writes without end, or leaves children behind that hold its output open, keeps nobody
waiting.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import select
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from types import TracebackType
from typing import Self

from migstream.errors import MigstreamError

__all__ = ["Command", "Execution", "Outcome", "Target", "TargetError", "scratch_directory"]

FILE_SIZE = 64 << 20  # octets that the program may write to a file, its output too
KEPT_OUTPUT = 64 << 10  # octets of its output that are looked at: the first quarter, and the end
STREAM_FILE = "stream"
SHELL = "/bin/sh"
LAUNCHER = "migstream-launcher"  # the shell's name for itself, where it complains
COMPLAINT = LAUNCHER.encode() + b": "
NOT_LAUNCHED = (126, 127)  # a shell's exit codes for a program that it cannot run
BUSY = 0.1  # of its time that a program computes which does not merely wait: the machine may be shared


class TargetError(MigstreamError):
    """The program that is to be fuzzed cannot be run at all."""


class Outcome(StrEnum):
    """What one execution came to."""

    ACCEPT = "accept"  # exit code 0
    REFUSE = "refuse"  # another one, without a sign of a crash
    CRASH = "crash"  # a signal, a sanitizer's report, an uncaught exception, or an exit code that says so
    HANG = "hang"  # no end within the timeout, or within as many seconds of processor time
    MEMORY = "memory"  # out of memory, or of the size that its files may have


#: Exit codes by which a shell, or another program around the target, passes a crash's signal on.
CRASH_CODES = frozenset(
    128 + number
    for number in (
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGSEGV,
        signal.SIGSYS,
    )
)


@dataclass(frozen=True)
class _Mark:
    """A line of output that says how a run ended. ``always``: whatever its exit code."""

    line: re.Pattern[bytes]
    outcome: Outcome
    always: bool = False


def _mark(line: bytes, outcome: Outcome, *, always: bool = False) -> _Mark:
    return _Mark(re.compile(line, re.MULTILINE), outcome, always)


#: The first that matches counts.
_MARKS = (
    _mark(rb"^MemoryError\b", Outcome.MEMORY),
    _mark(rb"std::bad_alloc", Outcome.MEMORY),
    _mark(rb"^memory allocation of \d+ bytes failed", Outcome.MEMORY),  # Rust
    _mark(rb"error while loading shared libraries: .*(failed to map|cannot)", Outcome.MEMORY),
    _mark(rb"^fatal error: .*(out of|cannot allocate) memory", Outcome.MEMORY),  # Go
    _mark(rb"Sanitizer: (allocation-size-too-big|out-of-memory|hard rss limit)", Outcome.MEMORY, always=True),
    _mark(rb"^==\d+==\s?ERROR: \w+Sanitizer", Outcome.CRASH, always=True),
    _mark(rb"^\S+:\d+:\d+: runtime error: ", Outcome.CRASH, always=True),  # UBSan
    _mark(rb"^Traceback \(most recent call last\):", Outcome.CRASH),  # Python
    _mark(rb"^thread '.*' .*panicked at ", Outcome.CRASH),  # Rust
    _mark(rb"^panic: ", Outcome.CRASH),  # Go
)

#: Signals with which a limit, not the program itself, ended it.
_SIGNALS = {
    signal.SIGXCPU: Outcome.HANG,
    signal.SIGXFSZ: Outcome.MEMORY,
    signal.SIGKILL: Outcome.MEMORY,  # not from us: the kernel's, where the machine's memory is short
}


@dataclass(frozen=True)
class Command:
    """How the program is called, and what it may use.

    Each ``{}`` in ``argv`` stands for the stream's file; with ``stdin`` the file is its standard input, and
    ``argv`` is left alone. ``timeout_s`` is in seconds of real time, ``memory`` in octets of address space.
    ``crash_codes`` are exit codes that count as crashes; ``look_at_output`` is whether a sanitizer's
    report, an uncaught exception or a panic in the output does too.
    """

    argv: tuple[str, ...]
    stdin: bool = False
    timeout_s: float = 5.0
    memory: int | None = 1 << 30
    crash_codes: frozenset[int] = CRASH_CODES
    look_at_output: bool = True

    def to_json(self) -> dict[str, object]:
        """Return the fields; `from_json` takes them back."""
        return {**asdict(self), "argv": list(self.argv), "crash_codes": sorted(self.crash_codes)}

    @classmethod
    def from_json(cls, fields: dict[str, object]) -> Self:
        """Make a command of `to_json`'s fields; `TypeError` or `ValueError` where they are others."""
        argv, codes = fields["argv"], fields["crash_codes"]
        if not isinstance(argv, list) or not isinstance(codes, list):
            raise TypeError("argv and crash_codes are lists")
        given = {**fields, "argv": tuple(map(str, argv)), "crash_codes": frozenset(map(int, codes))}
        return cls(**given)  # type: ignore[arg-type]  # the types of JSON's values are the caller's word

    def check(self) -> None:
        """Raise `TargetError` where this cannot be run."""
        program = self.argv[0] if self.argv else ""
        if not program:
            raise TargetError("the target is empty; give a command, such as --target 'reader {}'")
        if not self.stdin and not any("{}" in argument for argument in self.argv):
            raise TargetError("the target takes no stream; write {} for its file, or give --stdin")
        if shutil.which(program):
            return
        if Path(program).is_dir():
            raise TargetError(f"{program} is a directory, not a program")
        if Path(program).exists() and "/" in program:
            raise TargetError(f"{program} is not executable; chmod +x it, or name its interpreter first")
        where = "no such file" if "/" in program else "not found in PATH"
        raise TargetError(f"{program}: {where}; name the program that is to be fuzzed, or its path")


@dataclass(frozen=True)
class Execution:
    """One run: its outcome, the exit code or the signal, what it wrote (bounded), its time in seconds.

    ``busy``: it spent much of that time computing, not waiting.
    """

    outcome: Outcome
    exit_code: int | None
    signal: int | None
    output: bytes
    seconds: float
    busy: bool = False

    @property
    def ending(self) -> str:
        """How it ended: ``exit code 3``, ``SIGSEGV``, ``no end``."""
        if self.signal is not None:
            return signal_name(self.signal)
        return "no end" if self.exit_code is None else f"exit code {self.exit_code}"


def signal_name(number: int) -> str:
    """Return ``SIGSEGV`` for 11."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def scratch_directory() -> Path:
    """Make a directory for the streams that are run: in memory where there is such a place."""
    shared = Path("/dev/shm")  # noqa: S108 (mkdtemp makes a name of its own in it)
    base = shared if os.access(shared, os.W_OK | os.X_OK) else Path(gettempdir())
    return Path(mkdtemp(prefix="migstream-fuzz-", dir=base))


class Target:
    """Runs a command on one stream after the other. A context manager; `close` removes its directory."""

    def __init__(self, command: Command, directory: Path | None = None) -> None:
        self.command = command
        self._owned = directory is None
        self.directory = directory or scratch_directory()
        self.stream_path = self.directory / STREAM_FILE
        path = str(self.stream_path)
        program = command.argv[0]
        self._program = shutil.which(program) or program
        self._argv = command.argv
        if not command.stdin:
            self._argv = tuple(argument.replace("{}", path) for argument in command.argv)
        self._stdin = path if command.stdin else os.devnull
        hang = math.ceil(command.timeout_s) + 1
        limits = {
            resource.RLIMIT_CPU: hang,  # for what leaves the session and spins on, where no kill reaches it
            resource.RLIMIT_CORE: 1,  # not 0, which does not keep a core from a handler in a pipe
            resource.RLIMIT_FSIZE: FILE_SIZE,
        }
        # Hard limits stay: a program that sets a limit of its own just then must not be refused that.
        self._limits = [(limit, _soft(limit, value)) for limit, value in limits.items()]
        self._launcher: tuple[str, ...] = ()
        if _has_interpreter(Path(self._program)):
            # Set before the program is: what it starts meanwhile would escape a limit that comes later.
            room = _soft(resource.RLIMIT_FSIZE, FILE_SIZE)[0] >> 9  # a shell counts blocks of 512 octets
            shell = f"ulimit -S -f {room}"
            if command.memory is not None:
                shell += f" && ulimit -S -v {_soft(resource.RLIMIT_AS, command.memory)[0] >> 10}"
            self._launcher = (SHELL, "-c", f'{shell} && exec "$@"', LAUNCHER)
        elif command.memory is not None:
            self._limits.append((resource.RLIMIT_AS, _soft(resource.RLIMIT_AS, command.memory)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the directory, where this target made it."""
        if self._owned:
            shutil.rmtree(self.directory, ignore_errors=True)

    def run(self, octets: bytes, timeout_s: float | None = None) -> Execution:
        """Run the program on one stream, for ``timeout_s`` seconds instead of the command's.

        Raises `TargetError` where it cannot be started.
        """
        self._write(octets)
        timeout_s = self.command.timeout_s if timeout_s is None else timeout_s
        output = os.memfd_create("output", os.MFD_CLOEXEC)
        try:
            started = time.monotonic()
            status, processor_s = self._spawn_and_wait(self._launcher, output, timeout_s)
            if self._launcher and status in NOT_LAUNCHED and os.pread(output, 32, 0).startswith(COMPLAINT):
                # Without the shell, the kernel says why.
                status, processor_s = self._spawn_and_wait((), output, timeout_s)
            seconds = time.monotonic() - started
            return self._execution(status, _read(output), seconds, busy=processor_s > seconds * BUSY)
        finally:
            os.close(output)

    def _write(self, octets: bytes) -> None:
        try:
            self.stream_path.write_bytes(octets)
        except OSError:  # a program may have made anything of its input: removed, protected or replaced it
            if self.stream_path.is_dir():
                shutil.rmtree(self.stream_path, ignore_errors=True)
            self.stream_path.unlink(missing_ok=True)
            self.stream_path.write_bytes(octets)

    def _spawn_and_wait(
        self, launcher: tuple[str, ...], output: int, timeout_s: float
    ) -> tuple[int | None, float]:
        """Return the exit code (negative: a signal; ``None``: no end), and the processor time it took."""
        try:
            pid = os.posix_spawn(
                SHELL if launcher else self._program,
                (*launcher, self._program, *self._argv[1:]) if launcher else self._argv,
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, self._stdin, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, output, 1),
                    (os.POSIX_SPAWN_DUP2, output, 2),
                ],
                setsid=True,
                # Python ignores these, or a worker does; the program is to have them as from a shell.
                setsigdef=[signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ],
            )
        except OSError as exc:
            hint = (
                "; does its first line name its interpreter?" if exc.strerror == "Exec format error" else ""
            )
            raise TargetError(f"{self._program} cannot be run: {exc.strerror}{hint}") from None
        try:
            for limit, value in self._limits:
                resource.prlimit(pid, limit, value)
            ended = _ended(pid, timeout_s)
        except PermissionError:
            raise TargetError(
                f"{self._program} takes another user's rights, so no limits can be set for it; "
                "fuzz it as that user"
            ) from None
        finally:
            # Its whole session, before it is reaped: so long the number cannot be another's.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            _, status, used = os.wait4(pid, 0)
        return os.waitstatus_to_exitcode(status) if ended else None, used.ru_utime + used.ru_stime

    def _execution(self, status: int | None, output: bytes, seconds: float, *, busy: bool) -> Execution:
        exit_code = status if status is not None and status >= 0 else None
        number = -status if status is not None and status < 0 else None
        outcome = self._class(exit_code, number, output)
        return Execution(outcome, exit_code, number, output, seconds, busy)

    def _class(self, exit_code: int | None, number: int | None, output: bytes) -> Outcome:
        if exit_code is None and number is None:
            return Outcome.HANG
        if number is not None and number in _SIGNALS:
            return _SIGNALS[signal.Signals(number)]
        for mark in _MARKS if self.command.look_at_output else ():
            if (mark.always or exit_code != 0) and mark.line.search(output):
                return mark.outcome
        if number is not None or exit_code in self.command.crash_codes:
            return Outcome.CRASH
        return Outcome.REFUSE if exit_code else Outcome.ACCEPT


def _soft(limit: int, value: int) -> tuple[int, int]:
    """Return a limit to set: ``value``, or less where no more is allowed, and the hard limit as it is."""
    hard = resource.getrlimit(limit)[1]
    return (value if hard == resource.RLIM_INFINITY else min(value, hard)), hard


def _has_interpreter(program: Path) -> bool:
    """Tell whether the kernel can run a program without help, which alone a shell may be asked to.

    A file of another form a shell would take for a script of its own. The kernel refuses it, or has a
    handler for it.
    """
    try:
        with program.open("rb") as file:
            return file.read(4).startswith((b"\x7fELF", b"#!"))
    except PermissionError:
        return True  # execute permission alone: a script would need more
    except OSError:
        return False


def _ended(pid: int, timeout_s: float) -> bool:
    """Wait for a child's end without reaping it; return whether it came in time."""
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(math.ceil(1000 * timeout_s)))
    finally:
        os.close(pidfd)


def _read(output: int) -> bytes:
    """Return what was written: all, or the first quarter and the end of what is kept."""
    size = os.fstat(output).st_size
    if size <= KEPT_OUTPUT:
        return os.pread(output, size, 0)
    head, tail = KEPT_OUTPUT // 4, KEPT_OUTPUT - KEPT_OUTPUT // 4
    left_out = f"\n[{size - KEPT_OUTPUT} octets left out]\n".encode()
    return os.pread(output, head, 0) + left_out + os.pread(output, tail, size - tail)
