"""Stopping a thread of another process, one system call in its name, and letting it go as it was. x86-64.

Theory of operation. A thread that is seized and interrupted halts inside the kernel, on its way out to user
mode: whatever system call it was in has left ``-ERESTART...`` in rax and its number in orig_rax, and the
kernel looks at both only *after* the halt. So the registers may be exchanged for those of another call
(orig_rax = -1 there: nothing to restart), and if in the end the thread is halted at the same kind of place
with its own registers back, the kernel restarts its system call as if nothing had been:

    running --seize, interrupt--> halted  (own registers saved, signals blocked, registers of our call set)
            --resume to entry---> entry of our call
            --resume to exit----> exit of our call     (rax: its result)
            --interrupt, resume-> halted  (own registers and signal mask put back)
            --detach------------> running

Single-stepping would do with less, but its SIGTRAP changes a process that blocks or handles that signal.
Signals that come meanwhile wait, as the thread has them blocked; SIGSTOP cannot be blocked, but then the
kernel keeps the whole process stopped behind our back, and a detached thread joins it.

All functions must run in one thread of the tracer: to the kernel, that one is it. Source: ptrace(2);
kernel/signal.c, get_signal; arch/x86/kernel/signal.c, arch_do_signal_or_restart.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import time
from pathlib import Path

__all__ = ["EndedError", "NotStoppedError", "Registers", "Tracee", "find_system_call", "threads"]

# Requests, options and events: linux/ptrace.h.
POKEDATA, CONT, GETREGS, SETREGS, DETACH, SYSCALL = 5, 7, 12, 13, 17, 24
SETOPTIONS, SEIZE, INTERRUPT, GETSIGMASK, SETSIGMASK, GET_RSEQ = (
    0x4200,
    0x4206,
    0x4207,
    0x420A,
    0x420B,
    0x420F,
)
TRACESYSGOOD = 1 << 0
SUSPEND_SECCOMP = 1 << 21
EVENT_STOP = 128
SYSTEM_CALL_STOP = signal.SIGTRAP | 0x80  # what TRACESYSGOOD makes of it

ALL_THREADS = 0x4000_0000  # __WALL of waitpid(2): threads are children too
USER_CODE_64 = 0x33  # the cs of 64-bit code
SYSTEM_CALL = b"\x0f\x05"  # the instruction syscall
RSEQ_CS_AT = 8  # struct rseq (linux/rseq.h): {u32 cpu_id_start, cpu_id; u64 rseq_cs; ...}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


_REGISTERS = (  # in the order of sys/user.h
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax "
    "rip cs eflags rsp ss fs_base gs_base ds es fs gs"
)


class EndedError(Exception):
    """The thread has ended."""


class NotStoppedError(Exception):
    """The thread did not halt in time; it is being traced until the tracer ends."""


class Registers(ctypes.Structure):
    """``struct user_regs_struct`` of x86-64 (sys/user.h)."""

    _fields_ = [(name, ctypes.c_uint64) for name in _REGISTERS.split()]


def threads(pid: int) -> dict[int, str]:
    """Return the threads of ``pid`` with their state, a letter of proc(5), those that have ended left out."""
    states = {}
    for tid in os.listdir(f"/proc/{pid}/task"):
        try:
            stat = Path(f"/proc/{pid}/task/{tid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state = stat.rpartition(")")[2].split()[0]  # a thread's name may have brackets and blanks
        if state not in "ZX":
            states[int(tid)] = state
    return states


def find_system_call(pid: int) -> int:
    """Return the address of a ``syscall`` instruction in the process. Raises `LookupError`, `OSError`."""
    with open(f"/proc/{pid}/maps") as maps:
        lines = [line.split(maxsplit=5) for line in maps]
    executable = [line for line in lines if line[1].startswith("r-x")]
    executable.sort(key=lambda line: line[-1].strip() != "[vdso]")  # the shortest, and nearly always there
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in executable:
            start, end = (int(bound, 16) for bound in line[0].split("-"))
            for piece in range(start, end, 1 << 20):
                try:
                    found = os.pread(memory.fileno(), min(1 << 20, end - piece), piece).find(SYSTEM_CALL)
                except OSError:  # [vsyscall] cannot be read
                    break
                if found >= 0:
                    return piece + found
    raise LookupError(f"process {pid} has no syscall instruction in its memory")


class Tracee:
    """A thread that is traced, from `seize` to `detach`."""

    def __init__(self, tid: int) -> None:
        self.tid = tid

    def seize(self) -> None:
        """Start to trace; the thread runs on. Raises `OSError` (EPERM: no right to, or traced already)."""
        self._ptrace(SEIZE, 0, TRACESYSGOOD)

    def suspend_seccomp(self) -> None:
        """Lift the halted thread's filter of system calls until `detach`. Raises `OSError` (EPERM)."""
        self._ptrace(SETOPTIONS, 0, TRACESYSGOOD | SUSPEND_SECCOMP)

    def interrupt(self) -> None:
        """Ask the thread to halt; `wait_halted` follows."""
        self._ptrace(INTERRUPT)

    def wait_halted(self, deadline: float) -> None:
        """Wait until the thread is halted, or raise `NotStoppedError` at the monotonic time ``deadline``."""
        pause_s = 0.0001
        while True:
            tid, status = self._waitpid(os.WNOHANG)
            if tid:
                if self._event(status) == EVENT_STOP:
                    return
                self._resume(CONT, os.WSTOPSIG(status))  # a signal was first; its handler has yet to begin
            elif time.monotonic() > deadline:
                raise NotStoppedError(f"thread {self.tid} did not stop")
            else:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.005)

    def detach(self) -> None:
        """Let the halted thread go."""
        self._ptrace(DETACH)

    def call(self, instruction: int, number: int, *arguments: int) -> int:
        """Have the halted thread make one system call; return its result, a negative errno for an error.

        ``instruction`` is where the thread has a ``syscall``. The thread is halted as before afterwards.
        Raises `EndedError`, and `OSError` (ENOEXEC) for a thread that runs 32-bit code.
        """
        own = self.registers()
        if own.cs != USER_CODE_64:
            raise OSError(errno.ENOEXEC, f"thread {self.tid} runs 32-bit code")
        mask = self._signal_mask()
        critical_section = self._critical_section()
        ours = Registers.from_buffer_copy(own)
        ours.rip, ours.rax, ours.orig_rax = instruction, number, 2**64 - 1
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(ours, name, value)
        self._set_signal_mask(b"\xff" * 8)
        self._set_registers(ours)
        self._run_until(SYSCALL, SYSTEM_CALL_STOP, 0)
        self._run_until(SYSCALL, SYSTEM_CALL_STOP, 0)
        result = ctypes.c_int64(self.registers().rax).value
        self.interrupt()
        self._run_until(CONT, None, EVENT_STOP)
        self._set_registers(own)
        self._set_signal_mask(mask)
        if critical_section is not None:
            self._ptrace(POKEDATA, *critical_section)
        return result

    def registers(self) -> Registers:
        """Return the halted thread's registers."""
        registers = Registers()
        self._ptrace(GETREGS, 0, ctypes.addressof(registers))
        return registers

    def _set_registers(self, registers: Registers) -> None:
        self._ptrace(SETREGS, 0, ctypes.addressof(registers))

    def _signal_mask(self) -> bytes:
        mask = ctypes.create_string_buffer(8)
        self._ptrace(GETSIGMASK, 8, ctypes.addressof(mask))
        return mask.raw

    def _set_signal_mask(self, mask: bytes) -> None:
        buffer = ctypes.create_string_buffer(mask, 8)
        self._ptrace(SETSIGMASK, 8, ctypes.addressof(buffer))

    def _critical_section(self) -> tuple[int, int] | None:
        """Return address and value of the thread's pointer to its restartable sequence, if it is in one.

        The kernel clears it when it sees the thread elsewhere, as our call makes it: without the pointer the
        thread would go on in the middle of its sequence, although it lost the processor (rseq(2)).
        """
        configuration = ctypes.create_string_buffer(24)
        try:
            self._ptrace(GET_RSEQ, 24, ctypes.addressof(configuration))
        except OSError:  # a kernel without
            return None
        (area,) = struct.unpack_from("=Q", configuration)
        if not area:
            return None
        with open(f"/proc/{self.tid}/mem", "rb", buffering=0) as memory:
            (pointer,) = struct.unpack("=Q", os.pread(memory.fileno(), 8, area + RSEQ_CS_AT))
        return (area + RSEQ_CS_AT, pointer) if pointer else None

    def _run_until(self, request: int, stop: int | None, event: int) -> None:
        """Resume the thread until it halts with the signal ``stop`` and ``event``; pass others on."""
        self._resume(request, 0)
        while True:
            _, status = self._waitpid(0)
            found = os.WSTOPSIG(status)
            if self._event(status) == event and stop in (None, found):
                return
            self._resume(request, 0 if self._event(status) else found)

    def _resume(self, request: int, deliver: int) -> None:
        self._ptrace(request, 0, deliver)

    def _waitpid(self, options: int) -> tuple[int, int]:
        try:
            tid, status = os.waitpid(self.tid, options | ALL_THREADS)
        except ChildProcessError as exc:
            raise EndedError(f"thread {self.tid} has ended") from exc
        if tid and not os.WIFSTOPPED(status):
            raise EndedError(f"thread {self.tid} has ended")
        return tid, status

    @staticmethod
    def _event(status: int) -> int:
        return status >> 16

    def _ptrace(self, request: int, address: int = 0, data: int = 0) -> None:
        ctypes.set_errno(0)
        if _libc.ptrace(request, self.tid, address, data) < 0:
            code = ctypes.get_errno()
            if code == errno.ESRCH and request != SEIZE:  # a tracee that was killed
                raise EndedError(f"thread {self.tid} has ended")
            raise OSError(code, os.strerror(code))
