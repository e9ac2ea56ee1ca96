"""A machine's RAM as a file: found in QEMU's process, opened, mapped, and locked against a second save."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from migstream.bitmap import PfnBitmap
from migstream.errors import GuestError
from migstream.guests.image import file_holes
from migstream.guests.memory import Memory
from migstream.guests.protocols import PAGE_SHIFT

__all__ = ["Mapping", "RamFile", "find_mapping", "flags_for"]

_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)")


@dataclass(frozen=True)
class Mapping:
    """A line of ``/proc/PID/maps``, as proc(5) has it."""

    start: int
    end: int
    permissions: str
    offset: int
    device: int
    inode: int
    path: str

    @property
    def shared(self) -> bool:
        """Whether it is of a file, and what one process writes others see."""
        return self.permissions[3] == "s" and self.inode != 0


def flags_for(size: int) -> str:
    """Return the flags that give a QEMU machine RAM of ``size`` octets which can be migrated."""
    mib = f"{size >> 20}M"
    return (
        f"-object memory-backend-memfd,id=ram,size={mib},share=on -machine memory-backend=ram -m {mib} "
        "(with -machine's other options)"
    )


def find_mapping(pid: int, address: int) -> Mapping:
    """Return what the process ``pid`` has mapped at ``address``. Raises `GuestError`."""
    try:
        with Path(f"/proc/{pid}/maps").open() as lines:
            for line in lines:
                match = _LINE.match(line)
                if match is None:
                    continue
                start, end, offset, major, minor = (int(match[i], 16) for i in (1, 2, 4, 5, 6))
                if start <= address < end:
                    device = os.makedev(major, minor)
                    return Mapping(start, end, match[3], offset, device, int(match[7]), match[8])
    except (PermissionError, FileNotFoundError, ProcessLookupError) as exc:
        raise GuestError(
            f"process {pid}, which holds the QMP socket, cannot be looked at: {exc.strerror}; run migstream "
            "on QEMU's host, as root or as QEMU's user, or name QEMU's process by pid="
        ) from exc
    raise GuestError(
        f"process {pid}, which made the QMP socket, has no memory at {address:#x}: it is not this QEMU; name "
        "QEMU's process by pid="
    )


class RamFile:
    """RAM of ``size`` octets, mapped here and in QEMU. Close it, or use it as a context manager.

    ``address`` is where QEMU's process has it; ``memory`` is our own mapping, whose pages are numbered as in
    the file. While it is open, a second one of the same machine is refused.
    """

    def __init__(self, pid: int, address: int, size: int, *, writable: bool) -> None:
        """Open what ``pid`` has at ``address``. Raises `GuestError`."""
        mapping = find_mapping(pid, address)
        if not mapping.shared:
            what = "private" if mapping.inode else "anonymous"
            raise GuestError(
                f"QEMU's RAM is {what} memory, which no other process can see; start QEMU with "
                f"{flags_for(size)}"
            )
        self.pid, self.address, self.size = pid, address, size
        self._fd = _open(pid, mapping, os.O_RDWR if writable else os.O_RDONLY)
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GuestError(
                    f"the memory of QEMU's process {pid} is in use by another migstream: the machine is "
                    "being saved, migrated or restored already; wait until that ends"
                ) from None
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            offset = mapping.offset + address - mapping.start
            self._from_start = offset == 0
            self.memory = Memory(
                mmap.mmap(self._fd, size, mmap.MAP_SHARED, protection, offset=offset), size >> PAGE_SHIFT
            )
        except (OSError, ValueError) as exc:
            os.close(self._fd)
            raise GuestError(f"QEMU's RAM, {mapping.path}, cannot be mapped: {exc}") from exc
        except BaseException:
            os.close(self._fd)
            raise

    def holes(self) -> PfnBitmap:
        """Return which pages nobody ever wrote to. To read such a page would give it memory."""
        n_pages = self.memory.n_pages
        return file_holes(self._fd, n_pages) if self._from_start else PfnBitmap(n_pages)

    def clear(self, first: int, count: int) -> None:
        """Make ``count`` pages from ``first`` zeros, and give their memory back where the file allows."""
        try:
            self.memory.mapping.madvise(mmap.MADV_REMOVE, first << PAGE_SHIFT, count << PAGE_SHIFT)
        except OSError:  # no holes in files of huge pages, or of some file systems
            run = self.memory.pages[first : first + count]
            run[run.any(axis=1)] = 0

    def close(self) -> None:
        """Let go of the file; the mapping goes with its last view. Closing twice is harmless."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # the mapping holds a copy of the descriptor
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(pid: int, mapping: Mapping, flags: int) -> int:
    """Open the file of ``mapping``: as the mapping itself (root only), or where the process holds it open."""
    flags |= os.O_CLOEXEC
    reason: OSError
    try:
        return os.open(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", flags)
    except OSError as exc:
        reason = exc
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            found = entry.stat()
            if (found.st_ino, found.st_dev) == (mapping.inode, mapping.device):
                return os.open(entry.path, flags)
    except OSError as exc:
        reason = exc
    raise GuestError(
        f"QEMU's RAM, {mapping.path} of process {pid}, cannot be opened: {reason.strerror}; run migstream as "
        "root or as the user that QEMU runs as"
    )
