"""One system call in another process's name: afterwards each thread is as it was, whatever it was doing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from migstream.errors import GuestError
from migstream.guests.process.ptrace import Tracee, find_system_call, threads
from migstream.guests.process.tracer import RefusedError, Tracer
from migstream.guests.process.tracing_child import Worker
from tests.processes import child, is_untouched, status, wait_for, why_not_traced

pytestmark = pytest.mark.skipif(bool(why_not_traced()), reason=why_not_traced())

ROOT = os.geteuid() == 0
AROUND = "import ctypes, os, signal, sys, threading, time\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@contextmanager
def program(code: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python code that prints "ready", then goes into what is to be disturbed, then prints its result."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", AROUND + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def inject(pid: int, times: int = 1) -> None:
    with Tracer(pid) as tracer:
        for _ in range(times):
            os.close(tracer.userfaultfd())


def inject_for_ever(tracer: Tracer) -> None:
    while True:
        os.close(tracer.userfaultfd())


def sleeping(pid: int) -> bool:
    return threads(pid)[pid] == "S"


# System calls that wait, and return 0 if they are not cut short: for each way in which the kernel restarts.
CALLS = {
    "poll with a time limit (restart block)": "libc.poll(None, 0, 700)",
    "nanosleep (restart block)": "libc.usleep(700000)",
    "read of a pipe (ERESTARTSYS)": "len(os.read(0, 9))",
    "futex with a time limit (restart block)": "int(LOCKED.acquire(timeout=0.7))",
    "waitpid (ERESTARTSYS)": "os.waitpid(os.spawnv(os.P_NOWAIT, '/bin/sleep', ['sleep', '0.7']), 0)[1]",
    "ppoll with a signal mask (ERESTARTNOHAND)": (
        "libc.ppoll(None, 0, (ctypes.c_long * 2)(0, 700_000_000), (ctypes.c_ulong * 16)(1))"
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_system_call_goes_on_as_if_it_had_not_been_disturbed(call: str) -> None:
    code = f"LOCKED = threading.Lock(); LOCKED.acquire()\nprint('ready', flush=True)\nprint({call})"
    with program(code) as process:
        wait_for(lambda: sleeping(process.pid), "the call waits")
        inject(process.pid, 5)
        assert is_untouched(process.pid)
        output, _ = process.communicate("")
    assert output == "0\n"


def test_registers_of_a_thread_that_computes_are_put_back() -> None:
    code = """
def chain(n):
    x = 1
    for _ in range(n): x = (x * 6364136223846793005 + 1442695040888963407) % 2**64
    return x
want = chain(200000)
print("ready", flush=True)
wrong = 0
while not os.path.exists(f"/proc/self/fd/0") or not __import__("select").select([0], [], [], 0)[0]:
    wrong += chain(200000) != want
print(wrong)
"""
    with program(code) as process:
        inject(process.pid, 100)
        output, _ = process.communicate("stop")
    assert output == "0\n"


def test_blocked_and_handled_signals_stay_as_they_are() -> None:
    """A single step would take the handler of SIGTRAP away where the signal is blocked."""
    code = """
signal.signal(signal.SIGTRAP, lambda *_: None)
signal.pthread_sigmask(signal.SIG_SETMASK, set(range(1, 65)) - {signal.SIGUSR1})
print("ready", flush=True)
time.sleep(60)
"""
    signals = ("SigBlk", "SigCgt", "SigIgn", "SigPnd", "ShdPnd")
    with program(code) as process:
        before = status(process.pid, *signals)
        inject(process.pid, 3)
        assert status(process.pid, *signals) == before
        assert int(before["SigBlk"], 16) & 1 << signal.SIGTRAP - 1


def test_signals_that_come_meanwhile_are_delivered() -> None:
    code = """
counts = [0, 0]
def count(number, frame): counts[number == signal.SIGUSR1] += 1
signal.signal(signal.SIGALRM, count)
signal.signal(signal.SIGUSR1, count)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
print("ready", flush=True)
while counts[1] < 100:
    before = counts[1]
    print(counts[1], flush=True)
    while counts[1] == before: sum(range(100))
signal.setitimer(signal.ITIMER_REAL, 0)
print("all", flush=True)
sys.stdin.read()
"""
    with program(code) as process:
        assert process.stdout is not None
        with Tracer(process.pid) as tracer:
            for n in range(100):
                assert process.stdout.readline() == f"{n}\n"
                sender = threading.Thread(target=process.send_signal, args=[signal.SIGUSR1])
                sender.start()
                os.close(tracer.userfaultfd())
                sender.join()
        assert process.stdout.readline() == "all\n"


def test_a_stopped_process_stays_stopped_and_can_be_continued() -> None:
    with child(16) as found:
        os.kill(found.pid, signal.SIGSTOP)
        wait_for(lambda: status(found.pid, "State")["State"][0] == "T", "the process stops")
        inject(found.pid, 3)
        wait_for(lambda: status(found.pid, "State")["State"][0] == "T", "it is stopped again")
        with Tracer(found.pid) as tracer:
            tracer.stop()
            assert status(found.pid, "State")["State"][0] == "t"
        wait_for(lambda: status(found.pid, "State")["State"][0] == "T", "it is stopped again")
        os.kill(found.pid, signal.SIGCONT)
        found.do("write", 1)


def test_stops_and_continues_from_outside_do_not_disturb() -> None:
    with child(16) as found:
        done = threading.Event()

        def disturb() -> None:
            while not done.is_set():
                os.kill(found.pid, signal.SIGSTOP)
                os.kill(found.pid, signal.SIGCONT)

        disturber = threading.Thread(target=disturb)
        disturber.start()
        try:
            inject(found.pid, 50)
        finally:
            done.set()
            disturber.join()
        found.do("write", 1)
        wait_for(lambda: is_untouched(found.pid), "the process is left alone")


def test_only_the_injected_thread_halts() -> None:
    """Another thread goes on while the first is held at the very place where calls are injected."""
    code = """
def go():
    while True: print("on", flush=True)
print("ready", flush=True)
threading.Thread(target=go, daemon=True).start()
signal.pause()
"""
    with program(code) as process:
        wait_for(lambda: len(threads(process.pid)) == 2, "there are two threads")
        wait_for(lambda: sleeping(process.pid), "the first waits for a signal")
        held = Tracee(process.pid)
        held.seize()
        held.interrupt()
        held.wait_halted(time.monotonic() + 10)
        assert process.stdout is not None
        for _ in range(20_000):  # more than a pipe holds: the other one runs now
            process.stdout.readline()
        assert held.call(find_system_call(process.pid), 39) == process.pid  # getpid
        for _ in range(20_000):
            process.stdout.readline()
        held.detach()
        assert is_untouched(process.pid)


def test_every_thread_stops_and_goes_on() -> None:
    code = """
def go():
    while True: threading.Thread(target=time.sleep, args=[0.0001]).start()
for _ in range(4): threading.Thread(target=go, daemon=True).start()
print("ready", flush=True)
signal.pause()
"""
    with program(code) as process, Tracer(process.pid) as tracer:
        for _ in range(5):
            tracer.stop()
            assert tracer.holds
            assert set(threads(process.pid).values()) == {"t"}
            tracer.resume()
            assert not tracer.holds
            assert status(process.pid, "TracerPid") == {"TracerPid": "0"}


def test_a_process_that_dies_meanwhile_is_an_error_and_nothing_hangs() -> None:
    for delay_ms in range(0, 20, 2):
        with child(16) as found, Tracer(found.pid) as tracer:
            killer = threading.Timer(delay_ms / 1000, found.kill)
            killer.start()
            with pytest.raises(GuestError, match="has ended"):
                inject_for_ever(tracer)
            killer.join()


def test_a_process_that_is_traced_already_is_refused_by_name() -> None:
    with child(16) as found, Tracer(found.pid) as first, Tracer(found.pid) as second:
        first.stop()
        with pytest.raises(RefusedError, match=r"is traced by process \d+ already.*end that first"):
            second.userfaultfd()
        with pytest.raises(RefusedError, match="already"):
            second.stop()
        assert first.holds
        first.resume()
        second.stop()
        assert second.holds


@pytest.mark.skipif(not ROOT, reason="only root can become somebody without the right")
def test_who_may_not_trace_is_told_what_would_help() -> None:
    with child(16) as found:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:  # as nobody; what the tracer's process does is done here
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            try:
                Worker(found.pid).stop()
                os.write(writing, b"stopped")
            except BaseException as exc:
                os.write(writing, str(exc).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        answer = os.read(reading, 4096).decode()
        os.close(reading)
        os.close(writing)
        assert "may not be traced: Operation not permitted; run as root (CAP_SYS_PTRACE)" in answer
        assert is_untouched(found.pid)


def test_a_system_call_can_be_injected_while_everything_is_stopped() -> None:
    with child(16) as found, Tracer(found.pid) as tracer:
        tracer.stop()
        os.close(tracer.userfaultfd())
        assert tracer.holds
        tracer.resume()
        found.do("write", 1)
        assert is_untouched(found.pid)


@pytest.mark.skipif(not ROOT, reason="lifting seccomp for the moment needs root")
def test_a_filter_of_system_calls_that_would_kill_is_passed_by() -> None:
    code = """
import struct
kill, allow, number = 0x80000000, 0x7FFF0000, 323
program = struct.pack("=" + 4 * "HBBI", 0x20, 0, 0, 0, 0x15, 0, 1, number, 6, 0, 0, kill, 6, 0, 0, allow)
buffer = ctypes.create_string_buffer(program)
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, struct.pack("=HxxxxxxQ", 4, ctypes.addressof(buffer))) == 0
print("ready", flush=True)
print(len(sys.stdin.read()))
"""
    with program(code) as process:
        with contextlib.suppress(RefusedError):  # a kernel without CONFIG_CHECKPOINT_RESTORE
            inject(process.pid)
            with Tracer(process.pid) as tracer:
                tracer.stop()
                os.close(tracer.userfaultfd())
        assert status(process.pid, "Seccomp") == {"Seccomp": "2"}
        assert process.communicate("abc")[0] == "3\n"


def test_the_descriptor_limit_of_the_process_is_its_answer() -> None:
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
    code = limited + "print('ready', flush=True)\nprint(len(sys.stdin.read()))"
    with program(code) as process:
        with pytest.raises(RefusedError, match="userfaultfd call failed: Too many open files"):
            inject(process.pid)
        with Tracer(process.pid) as tracer:
            tracer.stop()
            with pytest.raises(RefusedError, match="Too many open files"):
                tracer.userfaultfd()
            assert tracer.holds
        assert process.communicate("abc")[0] == "3\n"
