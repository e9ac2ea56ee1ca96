"""The mappings of a process, and which of them are taken for a guest's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from migstream.errors import GuestError

__all__ = ["Mapping", "Selection", "everything_writable", "named", "read_mappings", "spans"]

#: Names of mappings that lead to a device or the kernel, not to memory of the process's own.
NO_MEMORY = ("/dev/", "anon_inode:", "[v")
MEMORY_IN_DEV = ("/dev/shm/", "/dev/zero", "/dev/hugepages/")  # noqa: S108 - a name to compare with

SHOWN = 8  # names in an error message


@dataclass(frozen=True)
class Mapping:
    """A line of /proc/PID/maps (proc(5)): memory from ``start`` up to ``end`` with the same properties."""

    start: int
    end: int
    permissions: str  # such as "rw-p"
    offset: int  # of its start in the file, in octets
    file: tuple[str, int]  # device and inode; inode 0: anonymous
    name: str  # of the file, or such as "[heap]"; without " (deleted)"

    @property
    def readable(self) -> bool:
        """Whether the process may read it."""
        return self.permissions[0] == "r"

    @property
    def writable(self) -> bool:
        """Whether the process may write it, and can read it."""
        return self.permissions.startswith("rw")

    @property
    def shared_file(self) -> bool:
        """Whether its pages are those of a file, so that our own mapping of that has the same."""
        return self.permissions[3] == "s" and self.file[1] != 0

    @property
    def is_memory(self) -> bool:
        """Whether it is memory, as opposed to a device's or the kernel's."""
        return not self.name.startswith(NO_MEMORY) or self.name.startswith(MEMORY_IN_DEV)

    def continued_by(self, other: Mapping) -> bool:
        """Whether ``other`` goes on where this one ends, in memory and in its file."""
        if other.start != self.end or (other.file, other.shared_file) != (self.file, self.shared_file):
            return False
        return self.file[1] == 0 or other.offset == self.offset + (self.end - self.start)


Selection = Callable[[Sequence[Mapping]], list[Mapping]]


def read_mappings(pid: int) -> list[Mapping]:
    """Return the mappings of ``pid`` by address. Raises `GuestError` if it has ended or may not be read."""
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="backslashreplace") as maps:
            found = [_parse(line) for line in maps]
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise GuestError(f"there is no process {pid} (any more)") from exc
    except PermissionError as exc:
        raise GuestError(
            f"the mappings of process {pid} may not be read; run as its user where tracing is allowed, or as "
            "root (CAP_SYS_PTRACE)"
        ) from exc
    if not found:
        raise GuestError(f"process {pid} has no memory: it has ended, or is a thread of the kernel")
    return found


def _parse(line: str) -> Mapping:
    bounds, permissions, offset, device, inode, *rest = line.rstrip("\n").split(maxsplit=5)
    start, end = (int(bound, 16) for bound in bounds.split("-"))
    name = rest[0].removesuffix(" (deleted)") if rest else ""
    return Mapping(start, end, permissions, int(offset, 16), (device, int(inode)), name)


def everything_writable(mappings: Sequence[Mapping]) -> list[Mapping]:
    """Select what the process may write: its data, heap, stacks, anonymous and shared memory."""
    return _joined([each for each in mappings if each.writable and each.is_memory])


def named(name: str) -> Selection:
    """Return what selects the writable mappings called ``name``, such as ``[heap]`` or ``/memfd:ram``."""

    def select(mappings: Sequence[Mapping]) -> list[Mapping]:
        found = [each for each in mappings if each.name == name and each.writable]
        if not found:
            known = sorted({each.name for each in mappings if each.writable and each.name}, key=len)
            shown = ", ".join(known[:SHOWN]) + (
                f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
            )
            raise GuestError(f"the process has no writable mapping called {name!r}; it has {shown}")
        return _joined(found)

    return select


def spans(bounds: Sequence[tuple[int, int]]) -> Selection:
    """Return what selects the memory of ``bounds``: (address, end) of each, ascending, all of it readable."""

    def select(mappings: Sequence[Mapping]) -> list[Mapping]:
        readable = _joined([each for each in mappings if each.readable])
        found = []
        for start, end in bounds:
            here = [_cut(each, start, end) for each in readable if each.start < end and start < each.end]
            reached = start
            for each in here:
                if each.start != reached:
                    break
                reached = each.end
            if reached != end:
                raise GuestError(
                    f"the process has no readable memory at {reached:#x}, in the range {start:#x}-{end:#x}; "
                    "/proc/PID/maps shows what it has"
                )
            found += here
        return found

    return select


def _cut(mapping: Mapping, start: int, end: int) -> Mapping:
    first = max(start, mapping.start)
    return replace(
        mapping,
        start=first,
        end=min(end, mapping.end),
        offset=mapping.offset + (first - mapping.start if mapping.file[1] else 0),
    )


def _joined(mappings: Sequence[Mapping]) -> list[Mapping]:
    """Join neighbours that differ in nothing that counts here: the kernel splits and joins them at will."""
    joined: list[Mapping] = []
    for each in mappings:
        if joined and joined[-1].continued_by(each):
            joined[-1] = replace(joined[-1], end=each.end)
        else:
            joined.append(each)
    return joined
