"""A guest of KVM for the engines: it writes pages in an order that can be replayed."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Self, overload

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.errors import GuestError
from migstream.guests.memory import Memory
from migstream.guests.page_book import PageBook
from migstream.guests.protocols import PAGE_SHIFT, RestoredRings
from migstream.records import Record
from migstream.records.libxc import GuestType, HvmContext
from migstream.records.page_types import PageType
from tests.kvm.vm import REGISTERS, REGS_LENGTH, SREGS_LENGTH, Vm

__all__ = ["KvmGuest"]

# Where things lie in the guest's memory.
PML4, PDPT, DIRECTORY = 0x10000, 0x11000, 0x12000
CODE = 0x100000
WINDOW_PFN = 0x1000  # the first page that the guest writes to, at 16 MiB

# The guest's program: a linear congruential generator chooses a page of the window after the other.
MULTIPLIER, INCREMENT = 6364136223846793005, 1442695040888963407
STEPS = 100  # pages written between two ``out``
PROGRAM = bytes.fromhex(
    "4c89e9"  # start: mov rcx, r13        steps until the next out
    "490fafd9"  # step: imul rbx, r9       the generator's next state
    "4c01d3"  # add rbx, r10
    "4889d8"  # mov rax, rbx
    "48c1e821"  # shr rax, 33
    "4c21d8"  # and rax, r11               the page's number in the window
    "48c1e00c"  # shl rax, 12
    "4801f8"  # add rax, rdi
    "49ffc4"  # inc r12                    how many steps there were
    "4c8920"  # mov [rax], r12
    "48015808"  # add [rax + 8], rbx
    "48ffc9"  # dec rcx
    "75d9"  # jnz step
    "e610"  # out 0x10, al
    "ebd2"  # jmp start
)

# 64-bit mode, paging, user mode that may use ports.
CR0, CR4, EFER = 0x80050033, 0x20, 0x500  # PG AM WP NE ET MP PE; PAE; LMA LME
IOPL_3 = 0x3002
PRESENT_WRITABLE_USER, LARGE = 7, 0x80
# struct kvm_segment: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding
SEGMENT = struct.Struct("<QIH10B")
USER_CODE = SEGMENT.pack(0, 0xFFFFFFFF, 0x1B, 0xB, 1, 3, 0, 1, 1, 1, 0, 0, 0)
USER_DATA = SEGMENT.pack(0, 0xFFFFFFFF, 0x23, 0x3, 1, 3, 1, 1, 0, 1, 0, 0, 0)
TASK = SEGMENT.pack(0, 0x67, 0, 0xB, 1, 0, 0, 0, 0, 0, 0, 0, 0)
NO_LDT = SEGMENT.pack(0, 0, 0, 0x2, 0, 0, 0, 0, 0, 0, 0, 1, 0)
SEGMENTS = USER_CODE + 5 * USER_DATA + TASK + NO_LDT  # cs ds es fs gs ss tr ldt
DESCRIPTOR_TABLES = bytes(2 * 16)  # none: nothing loads a segment, nothing interrupts
CONTROL_REGISTERS = struct.Struct("<7Q")  # cr0 cr2 cr3 cr4 cr8 efer apic_base
INTERRUPTS = bytes(32)


class KvmGuest(PageBook):
    """A `SaveSource` and `RestoreTarget` on /dev/kvm. Its vCPU travels in HVM_CONTEXT, in KVM's form."""

    def __init__(self, n_pages: int) -> None:
        super().__init__(n_pages)
        self.memory = Memory.anonymous(n_pages)
        self.vm = Vm(self.memory)
        self._dirty = PfnBitmap(n_pages)
        self._context: bytes | None = None

    @classmethod
    def booted(cls, n_pages: int, window: int) -> Self:
        """Make a running guest that writes to ``window`` pages, a power of two."""
        guest = cls(n_pages)
        guest.book_run(0, n_pages, PageType.NOTAB)
        memory = guest.memory.octets
        for table, entry in ((PML4, PDPT), (PDPT, DIRECTORY)):
            struct.pack_into("<Q", memory, table, entry | PRESENT_WRITABLE_USER)
        for number in range(512):
            struct.pack_into(
                "<Q", memory, DIRECTORY + 8 * number, number << 21 | PRESENT_WRITABLE_USER | LARGE
            )
        memory[CODE : CODE + len(PROGRAM)] = PROGRAM
        registers = dict.fromkeys(REGISTERS, 0) | {
            "rip": CODE, "rflags": IOPL_3, "rdi": WINDOW_PFN << PAGE_SHIFT, "r11": window - 1,
            "rbx": 1, "r9": MULTIPLIER, "r10": INCREMENT, "r13": STEPS,
        }  # fmt: skip
        _, cr2, _, _, cr8, _, apic_base = CONTROL_REGISTERS.unpack_from(guest.vm.state, REGS_LENGTH + 224)
        guest.vm.state = (
            struct.pack(f"<{len(REGISTERS)}Q", *registers.values())
            + SEGMENTS
            + DESCRIPTOR_TABLES
            + CONTROL_REGISTERS.pack(CR0, cr2, PML4, CR4, cr8, EFER, apic_base)
            + INTERRUPTS
        )
        guest.resume()
        return guest

    def close(self) -> None:
        """End the guest."""
        self.vm.close()

    # What can be replayed

    @property
    def steps(self) -> int:
        """How many pages the guest has written. It is suspended."""
        return self.vm.registers["r12"]

    def window(self) -> npt.NDArray[np.uint64]:
        """Return the first two words of each page of the window, uint64[n, 2]."""
        size = self.vm.registers["r11"] + 1
        return self.memory.words[WINDOW_PFN : WINDOW_PFN + size, :2]

    @staticmethod
    def replayed(steps: int, size: int) -> npt.NDArray[np.uint64]:
        """Return what the window of ``size`` pages holds after ``steps`` of a guest that was never moved."""
        found = [[0, 0] for _ in range(size)]
        state = 1
        for step in range(1, steps + 1):
            state = (state * MULTIPLIER + INCREMENT) % 2**64
            page = found[state >> 33 & size - 1]
            page[0] = step
            page[1] = (page[1] + state) % 2**64
        return np.array(found, np.uint64)

    # Both ends

    @property
    def guest_type(self) -> GuestType:
        """HVM, as all that KVM runs."""
        return GuestType.HVM

    @overload
    def pages(self, pfns: npt.NDArray[np.uint64]) -> Sequence[memoryview]: ...
    @overload
    def pages(
        self, pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8]
    ) -> tuple[Sequence[memoryview], npt.NDArray[np.bool_]]: ...
    def pages(
        self, pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8] | None = None
    ) -> Sequence[memoryview] | tuple[Sequence[memoryview], npt.NDArray[np.bool_]]:
        """Return the memory of ``pfns``."""
        views = self.memory.views(pfns)
        return views if types is None else (views, np.zeros(len(pfns), np.bool_))

    def enable_dirty_log(self) -> None:
        """Let KVM log."""
        self._dirty.clear()
        self.vm.log_dirty_pages(True)

    def disable_dirty_log(self) -> None:
        """Let KVM not log."""
        self.vm.log_dirty_pages(False)

    def clean_dirty_log(self, into: PfnBitmap) -> None:
        """Move the log into ``into``."""
        self.peek_dirty_log(into)
        self._dirty.clear()

    def peek_dirty_log(self, into: PfnBitmap) -> None:
        """Copy the log into ``into``. KVM's is empty once it is read: what was read is kept here."""
        self.vm.take_dirty_log(into)
        self._dirty |= into
        into.words[:] = self._dirty.words

    # The source's side

    def static_records(self) -> Sequence[Record]:
        """Return nothing: CPUID is KVM's own on both sides."""
        return []

    def layout_records(self) -> Sequence[Record]:
        """Return nothing: the guest is HVM."""
        return []

    def state_records(self) -> Sequence[Record]:
        """Return the vCPU."""
        return [HvmContext(hvm_ctx=self.vm.state)]

    def suspend(self) -> None:
        """Stop the vCPU."""
        self.vm.stop()

    def resume(self) -> None:
        """Run the vCPU, half of the time or less: its host has work to do."""
        self.vm.start(pause_s=0.002)

    @property
    def suspended(self) -> bool:
        """Whether the vCPU is stopped."""
        return not self.vm.running

    # The target's side

    @property
    def vcpu_limit(self) -> int:
        """One."""
        return 1

    def localise(self, level: int, page: memoryview) -> None:
        """Never called: the guest is HVM, and its page tables are its own."""
        raise AssertionError(level)

    def apply(self, record: Record) -> None:
        """Take over the vCPU."""
        if isinstance(record, HvmContext):
            if len(record.hvm_ctx) != REGS_LENGTH + SREGS_LENGTH:
                raise GuestError("the HVM context is not one of this test's guests")
            self._context = record.hvm_ctx

    def complete(self) -> RestoredRings:
        """Hand the vCPU its state."""
        if self._context is None:
            raise GuestError("the stream has no HVM_CONTEXT; a machine cannot run without it")
        self.vm.state = self._context
        return RestoredRings(None, None)
