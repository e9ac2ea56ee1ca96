"""QEMU's device state: what its own migration calls sections, taken from one machine and fitted for another.

``xen-save-devices-state`` writes the devices and processors of a machine, and no memory: Xen's domains have
theirs elsewhere. Of a machine that is not Xen's there is more than the RAM that we carry ourselves: the BIOS
(which a QEMU that waits for a migration does not load, so that without it the guest could not reboot), video
memory, flash. Those blocks are put in front of the devices, as the section ``ram`` that QEMU would write.

Source: QEMU's docs/devel/migration.rst; migration/savevm.c (sections) and migration/ram.c (the section
``ram``, version 4, whose form has been the same since QEMU 2.3).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from migstream.errors import GuestError
from migstream.guests.protocols import PAGE_SIZE
from migstream.guests.qemu.client import QmpClient
from migstream.guests.qemu.machine import Machine
from migstream.guests.qemu.ram_map import Block, parse_blocks

__all__ = ["HEADER", "StateFile", "carried_blocks", "fitted", "ram_section", "read_block", "with_blocks"]

HEADER = b"QEVM" + (3).to_bytes(4, "big")
MAX_STATE = 120 << 20  # octets; a record of libxl's holds 128 MiB

# Kinds of sections
_FULL, _VMDESCRIPTION, _CONFIGURATION, _FOOTER = 0x04, 0x06, 0x07, 0x7E
# What a word of the section ``ram`` says, beside the offset of a page
_ZERO, _MEM_SIZE, _PAGE, _EOS, _CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
_RAM_VERSION = 4
_RAM_SECTION = 0xFFFF_FFFF  # a section's number: any that no device has
_WORD = struct.Struct(">Q")

#: Blocks that a machine like the source has anyway: option ROMs, tables for the firmware.
_MADE_ANEW = re.compile(r"pc\.rom|.*\.rom|/rom@.*")
_HOST_ADDRESS = re.compile(r" is 0x([0-9a-f]+)")


class StateFile:
    """Memory that is lent to QEMU to write its device state to. Close it, or use it as a context manager.

    So no file can be left behind, and none is needed that QEMU might not be allowed to create. It is lent
    beforehand: while the machine stands still, there is one command less to wait for.
    """

    def __init__(self, qmp: QmpClient) -> None:
        """Lend it. Raises `GuestError`."""
        self._qmp = qmp
        with ExitStack() as opened:
            self._memory = os.memfd_create("migstream-device-state")
            opened.callback(os.close, self._memory)
            # QEMU opens what it is lent for writing only, and insists that it was opened so.
            self._writable = os.open(f"/proc/self/fd/{self._memory}", os.O_WRONLY | os.O_CLOEXEC)
            opened.callback(os.close, self._writable)
            self._name = opened.enter_context(qmp.lent_fd(self._writable))
            self._opened = opened.pop_all()

    def take(self) -> bytes:
        """Return the state of the devices of the machine, which is stopped. Raises `GuestError`."""
        os.ftruncate(self._memory, 0)
        os.lseek(self._writable, 0, os.SEEK_SET)  # QEMU writes where its copy of the descriptor stands
        self._qmp.execute("xen-save-devices-state", filename=self._name)
        size = os.fstat(self._memory).st_size
        if size > MAX_STATE:
            raise GuestError(f"QEMU's device state has {size} octets; at most {MAX_STATE} are carried")
        octets = os.pread(self._memory, size, 0)
        if not octets.startswith(HEADER):
            raise GuestError(
                f"QEMU's device state begins with {octets[:8].hex(' ') or 'nothing'}; expected "
                f"{HEADER.hex(' ')}"
            )
        return octets

    def close(self) -> None:
        """Take it back. Closing twice is harmless."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def carried_blocks(qmp: QmpClient, machine: Machine) -> list[tuple[Block, int]]:
    """Return the blocks beside the RAM that have to go along, and where QEMU's process has each.

    Raises `GuestError` for one that the guest may have written to and that is not to be found.
    """
    carried = []
    for block in parse_blocks(qmp.monitor("info ramblock")):
        if block.name in (machine.region, f"/objects/{machine.region}"):
            continue
        address = _host_address(qmp, machine, block)
        if address is not None:
            carried.append((block, address))
        elif not _MADE_ANEW.fullmatch(block.name):
            raise GuestError(
                f"QEMU's machine has memory that is neither RAM nor within the guest's sight, "
                f"{block.name!r}: it would be lost; start QEMU without that device (video memory: -vga none)"
            )
    total = sum(block.length for block, _ in carried)
    if total > MAX_STATE:
        names = ", ".join(block.name for block, _ in carried)
        raise GuestError(
            f"QEMU's machine has {total >> 20} MiB of memory beside its RAM ({names}); at most "
            f"{MAX_STATE >> 20} MiB are carried: give it less video memory"
        )
    return carried


def _host_address(qmp: QmpClient, machine: Machine, block: Block) -> int | None:
    # A block's name is its region's, behind the path of the device that it belongs to.
    region = block.name if block.name.startswith("/") else block.name.rpartition("/")[2]
    for area in machine.areas:
        if area.region == region:
            match = _HOST_ADDRESS.search(qmp.monitor(f"gpa2hva {area.address:#x}"))
            if match is not None:
                return int(match[1], 16) - area.offset
    return None


def read_block(pid: int, address: int, length: int) -> bytes:
    """Return memory of QEMU's process that it shares with nobody. Raises `GuestError`."""
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            octets = os.pread(memory.fileno(), length, address)
    except OSError as exc:
        raise GuestError(
            f"memory of QEMU's process {pid} cannot be read: {exc.strerror}; run migstream as root, or let "
            "QEMU's user trace processes (sysctl kernel.yama.ptrace_scope=0)"
        ) from exc
    if len(octets) != length:
        raise GuestError(f"QEMU's process {pid} has {len(octets)} of {length} octets at {address:#x}")
    return octets


def with_blocks(state: bytes, blocks: Sequence[tuple[Block, bytes]], *, footer: bool) -> bytes:
    """Return ``state`` with the memory ``blocks`` before the devices; ``footer``: whether it has footers."""
    return HEADER + ram_section(blocks, footer=footer) + state[len(HEADER) :] if blocks else state


def ram_section(blocks: Sequence[tuple[Block, bytes]], *, footer: bool) -> bytes:
    """Return a section ``ram`` with the content of ``blocks``, each whole pages."""
    section = _RAM_SECTION.to_bytes(4, "big")
    parts: list[bytes | memoryview] = [
        bytes([_FULL]) + section + _name("ram") + struct.pack(">II", 0, _RAM_VERSION)
    ]
    parts.append(_WORD.pack(sum(block.length for block, _ in blocks) | _MEM_SIZE))
    parts += [_name(block.name) + _WORD.pack(block.length) for block, _ in blocks]
    for block, content in blocks:
        parts += _pages(block.name, memoryview(content))
    parts.append(_WORD.pack(_EOS))
    parts.append(bytes([_FOOTER]) + section if footer else b"")
    return b"".join(parts)


def _pages(name: str, content: memoryview) -> Iterable[bytes | memoryview]:
    named = False  # the first page names its block, those behind it go on with it
    for offset in range(0, len(content), PAGE_SIZE):
        page = content[offset : offset + PAGE_SIZE]
        same = _CONTINUE if named else 0
        of = b"" if named else _name(name)
        named = True
        if page == _EMPTY_PAGE:
            yield _WORD.pack(offset | _ZERO | same) + of + b"\0"
        else:
            yield _WORD.pack(offset | _PAGE | same) + of
            yield page


_EMPTY_PAGE = bytes(PAGE_SIZE)


def _name(name: str) -> bytes:
    octets = name.encode()
    return bytes([len(octets)]) + octets


def fitted(state: bytes, machine: Machine) -> bytes:
    """Return ``state`` as the QEMU of ``machine`` expects it from a migration. Raises `GuestError`.

    The command that made it leaves out the section that names the machine type, which QEMU wants unless
    ``-global migration.send-configuration=off``, and the description behind the end, which QEMU misses
    without failing unless ``-machine suppress-vmdesc=on``.
    """
    if not state.startswith(HEADER):
        raise GuestError(
            f"the emulator's state begins with {state[:8].hex(' ') or 'nothing'}; QEMU's begins with "
            f"{HEADER.hex(' ')}"
        )
    configuration = b""
    if machine.send_configuration:
        name = machine.machine.encode()
        configuration = bytes([_CONFIGURATION]) + struct.pack(">I", len(name)) + name
    description = bytes([_VMDESCRIPTION]) + struct.pack(">I", 2) + b"{}"
    return HEADER + configuration + state[len(HEADER) :] + description
