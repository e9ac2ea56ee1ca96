"""The tracer's own process: it answers one request after the other until its channel, descriptor 0, ends.

Whatever ends it, the kernel then lets go of every thread that it holds, as they were. So a process that is
stopped by it is stopped no longer than migstream lives. Only between setting the registers for a system call
and putting them back, half a millisecond, must it not be killed itself: it is in a session of its own, no
signal from a terminal reaches it, and that migstream is killed only ends its channel.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from migstream.guests.process.ptrace import EndedError, NotStoppedError, Tracee, find_system_call, threads
from migstream.guests.process.syscalls import USER_MODE_ONLY, USERFAULTFD, pidfd_getfd

__all__ = ["Worker", "main"]

CLOSE = 3  # the system call's number on x86-64
STOP_WITHIN_S = 10.0


class _RefusedError(Exception):
    """It cannot be done to this process; the message completes "because ..."."""


class Worker:
    """Does what is asked to the process ``pid``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.requests = {b"userfaultfd": self.userfaultfd, b"stop": self.stop, b"resume": self.resume}
        self._held: dict[int, Tracee] = {}

    def userfaultfd(self) -> list[int]:
        """Return a userfaultfd of the process, whose own copy is closed again."""
        if platform.machine() != "x86_64":
            raise _RefusedError(f"system calls can be injected on x86-64 only, not on {platform.machine()}")
        try:
            instruction = find_system_call(self.pid)
            pidfd = os.pidfd_open(self.pid)
        except LookupError as exc:
            raise _RefusedError(str(exc)) from exc
        try:
            with self._halted_thread() as thread:
                number = thread.call(instruction, USERFAULTFD["x86_64"], os.O_CLOEXEC | USER_MODE_ONLY)
                if number < 0:
                    raise _RefusedError(f"its userfaultfd call failed: {os.strerror(-number)}")
                try:
                    return [_copy(pidfd, number)]
                finally:
                    thread.call(instruction, CLOSE, number)
        finally:
            os.close(pidfd)

    @contextmanager
    def _halted_thread(self) -> Iterator[Tracee]:
        """Halt one thread of the process for as long as the block runs; all others go on."""
        if self._held:
            thread = next(iter(self._held.values()))
            self._pass_seccomp(thread)
            yield thread
            return
        states = threads(self.pid)
        if not states:
            raise EndedError
        thread = self._seized(min(states, key=lambda tid: (states[tid] == "D", tid)))  # D: waits for a disk
        thread.interrupt()
        thread.wait_halted(time.monotonic() + STOP_WITHIN_S)
        try:
            self._pass_seccomp(thread)
            yield thread
        finally:
            thread.detach()

    def _pass_seccomp(self, thread: Tracee) -> None:
        """Lift a filter of system calls, which might kill the process for ours."""
        if _status(thread.tid, "Seccomp") in ("", "0"):
            return
        try:
            thread.suspend_seccomp()
        except OSError as exc:
            raise _RefusedError(
                f"process {self.pid} is confined by seccomp, which only root (CAP_SYS_ADMIN) can lift for "
                f"the moment: {exc.strerror}"
            ) from exc

    def stop(self) -> list[int]:
        """Halt every thread; new ones come up only while not all are halted."""
        deadline = time.monotonic() + STOP_WITHIN_S
        seen: set[int] = set()
        while fresh := threads(self.pid).keys() - seen:
            seen |= fresh
            halting = []
            for tid in fresh:
                try:
                    thread = self._seized(tid)
                    thread.interrupt()
                    halting.append(thread)
                except (EndedError, ProcessLookupError):
                    continue
            for thread in halting:
                try:
                    thread.wait_halted(deadline)
                    self._held[thread.tid] = thread
                except EndedError:
                    continue
        if not self._held:
            raise EndedError
        return []

    def resume(self) -> list[int]:
        """Let every thread go."""
        for thread in self._held.values():
            try:
                thread.detach()
            except EndedError:
                continue
        self._held.clear()
        return []

    def _seized(self, tid: int) -> Tracee:
        thread = Tracee(tid)
        try:
            thread.seize()
        except OSError as exc:
            if tid not in threads(self.pid):
                raise EndedError from exc
            raise _RefusedError(self._why_not(tid, exc)) from exc
        return thread

    def _why_not(self, tid: int, exc: OSError) -> str:
        if tracer := int(_status(tid, "TracerPid")):
            return (
                f"process {self.pid} is traced by process {tracer} already (a debugger, strace or another "
                "save); end that first"
            )
        return (
            f"process {self.pid} may not be traced: {exc.strerror}; run as root (CAP_SYS_PTRACE), or as its "
            "user where kernel.yama.ptrace_scope is 0"
        )


def _copy(pidfd: int, number: int) -> int:
    try:
        return pidfd_getfd(pidfd, number)
    except OSError as exc:
        raise _RefusedError(f"its userfaultfd could not be taken over: {exc.strerror}") from exc


def _status(tid: int, field: str) -> str:
    """Return a field of /proc/TID/status, empty if there is none."""
    for line in Path(f"/proc/{tid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return line.partition(":")[2].strip()
    return ""


def _answer(worker: Worker, request: bytes) -> tuple[dict[str, str], list[int]]:
    """Do what is asked; return what went wrong, if anything, and descriptors.

    ``refused`` and ``ended`` (the process has) are messages, ``last`` is set where this process has to end,
    so that the kernel lets go of what was halted so far.
    """
    last = "yes" if request == b"stop" else ""
    ended = {"ended": f"process {worker.pid} has ended, or there never was one", "last": "yes"}
    try:
        return {}, worker.requests[request]()
    except _RefusedError as exc:
        return {"refused": str(exc), "last": last}, []
    except NotStoppedError as exc:
        why = "it may wait for a disk, or for a child that it made by vfork; try again"
        return {"refused": f"{exc} within {STOP_WITHIN_S:g} s: {why}", "last": "yes"}, []
    except (EndedError, FileNotFoundError, ProcessLookupError):
        return ended, []
    except OSError as exc:
        return {"refused": f"process {worker.pid}: {exc.strerror}", "last": last}, []


def main() -> None:
    """Answer requests about the process whose number is the only argument."""
    worker = Worker(int(sys.argv[1]))
    with socket.socket(fileno=0) as channel:
        for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)
        while request := channel.recv(64):
            answer, fds = _answer(worker, request)
            try:
                socket.send_fds(channel, [json.dumps(answer).encode()], fds)
            except OSError:  # nobody is there any more
                return
            for fd in fds:
                os.close(fd)
            if answer.get("last"):
                return


if __name__ == "__main__":
    main()
