"""A child to track and to save: it does to its memory what it is told, line by line, and answers each."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from migstream.errors import GuestError
from migstream.guests.process.ranges import MemoryRange
from migstream.guests.process.tracer import Tracer
from migstream.guests.process.tracking import track
from migstream.guests.protocols import PAGE_SIZE

CODE = r"""
import ctypes, mmap, os, sys, time
kind, n = sys.argv[1], int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
fd = -1
if kind == "memfd":
    fd = os.memfd_create("guest")
    os.ftruncate(fd, n * 4096)
flags = mmap.MAP_SHARED if kind != "private" else mmap.MAP_PRIVATE
m = mmap.mmap(fd, n * 4096, flags=flags if fd >= 0 else flags | mmap.MAP_ANONYMOUS)
base = ctypes.addressof(ctypes.c_char.from_buffer(m))
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
def write(*pages):
    for page in pages: m[page * 4096 + page % 4096] = (m[page * 4096 + page % 4096] + 1) % 256
def dontneed(first, count): m.madvise(mmap.MADV_DONTNEED, first * 4096, count * 4096)
def read_into(first, count):
    with open("/dev/urandom", "rb", buffering=0) as source:
        source.readinto(memoryview(m)[first * 4096 : (first + count) * 4096])
def pwrite(page): os.pwrite(fd, b"changed", page * 4096)
def unmap(first, count): libc.munmap(base + first * 4096, count * 4096)
def remap(first, count):
    unmap(first, count)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap(ctypes.c_void_p(base + first * 4096), ctypes.c_size_t(count * 4096), 3, 0x32, -1, 0)
def grow(count): globals().setdefault("more", []).append(mmap.mmap(-1, count * 4096))
def fork_and_write(page):
    if (pid := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    write(page)
    os.kill(pid, 9); os.waitpid(pid, 0)
def run(): os.execv("/bin/sleep", ["sleep", "60"])
def busy(n_writes_a_ms):
    import random, threading
    def go():
        while True:
            for _ in range(n_writes_a_ms):
                at = random.randrange(n) * 4096 + random.randrange(512) * 8
                m[at : at + 8] = os.urandom(8)
            time.sleep(0.001)
    threading.Thread(target=go, daemon=True).start()
print(base, flush=True)
for line in sys.stdin:
    what, *numbers = line.split()
    globals()[what](*map(int, numbers))
    print("done", flush=True)
"""


class Child:
    """A process with ``n_pages`` of memory of a ``kind``: private, shared (anonymous) or memfd."""

    def __init__(self, n_pages: int, kind: str = "private") -> None:
        self.n_pages = n_pages
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", CODE, kind, str(n_pages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.address = int(self._answer())

    @property
    def ranges(self) -> list[MemoryRange]:
        return [MemoryRange(self.address, self.n_pages * PAGE_SIZE, 0)]

    @property
    def spec(self) -> str:
        """The memory as the command line names it."""
        return f"process:{self.pid},range={self.address:x}-{self.ranges[0].end:x}"

    def tell(self, what: str, *numbers: int) -> None:
        assert self._process.stdin is not None
        print(what, *numbers, file=self._process.stdin, flush=True)

    def do(self, what: str, *numbers: int) -> None:
        self.tell(what, *numbers)
        assert self._answer() == "done\n"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def memory(self) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
        """Its memory as it is now, uint8[n_pages, 4096]."""
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            octets = os.pread(memory.fileno(), self.n_pages * PAGE_SIZE, self.address)
        return np.frombuffer(octets, np.uint8).reshape(self.n_pages, PAGE_SIZE)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None


@contextlib.contextmanager
def child(n_pages: int, kind: str = "private") -> Iterator[Child]:
    started = Child(n_pages, kind)
    try:
        yield started
    finally:
        started.kill()


def status(pid: int, *fields: str) -> dict[str, str]:
    """Return ``fields`` of /proc/PID/status."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: value.strip() for name, _, value in lines if name in fields}


def descriptors(pid: int) -> list[str]:
    """Return what the descriptors of a process lead to."""
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(entry.path))
    return sorted(found)


def is_untouched(pid: int) -> bool:
    """Whether nobody traces, stops or tracks a process."""
    found = status(pid, "State", "TracerPid")
    return (
        found["TracerPid"] == "0"
        and found["State"][0] not in "tT"
        and "anon_inode:[userfaultfd]" not in descriptors(pid)
        and not tracked(pid)
    )


def tracked(pid: int) -> bool:
    """Whether a userfaultfd write-protects memory of a process (VmFlags "uw" of proc(5))."""
    with open(f"/proc/{pid}/smaps") as smaps:
        return any(" uw" in line for line in smaps if line.startswith("VmFlags:"))


def wait_for(condition: object, what: str, tries: int = 1000) -> None:
    """Wait until ``condition()`` is true; fail after so many tries, some milliseconds each."""
    assert callable(condition)
    for _ in range(tries):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError(f"this did not come about: {what}")


@functools.cache
def why_not_traced() -> str:
    """Return why processes cannot be traced here; empty: they can."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "processes are traced on x86-64 Linux only"
    with child(1) as process, Tracer(process.pid) as tracer:
        try:
            os.close(tracer.userfaultfd())
        except GuestError as exc:
            return f"processes cannot be traced here: {exc}"
    return ""


@functools.cache
def why_no_write_protection() -> str:
    """Return why writes cannot be tracked by write protection here; empty: they can."""
    if why_not_traced():
        return why_not_traced()
    with child(1) as process:
        tracker = track(process.pid, process.ranges)
        tracker.close()
    return "" if tracker.name == "userfaultfd" else tracker.why


def numbers(found: Sequence[object]) -> list[int]:
    return [int(n) for batch in found for n in np.asarray(batch)]
