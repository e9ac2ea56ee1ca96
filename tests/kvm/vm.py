"""KVM by ioctl: one memory slot, one vCPU. Numbers and layouts are those of linux/kvm.h, for x86-64."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import threading
import time
from enum import IntEnum

from migstream.bitmap import PfnBitmap
from migstream.guests.memory import Memory

__all__ = ["DEVICE", "REGISTERS", "Exit", "Vm"]

DEVICE = "/dev/kvm"

NONE, WRITE, READ = 0, 1, 2


def _ioctl(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | 0xAE << 8 | number


CREATE_VM = _ioctl(NONE, 0x01, 0)
GET_VCPU_MMAP_SIZE = _ioctl(NONE, 0x04, 0)
GET_SUPPORTED_CPUID = _ioctl(READ | WRITE, 0x05, 8)
CREATE_VCPU = _ioctl(NONE, 0x41, 0)
GET_DIRTY_LOG = _ioctl(WRITE, 0x42, 16)
SET_USER_MEMORY_REGION = _ioctl(WRITE, 0x46, 32)
RUN = _ioctl(NONE, 0x80, 0)
GET_REGS = _ioctl(READ, 0x81, 144)
SET_REGS = _ioctl(WRITE, 0x82, 144)
GET_SREGS = _ioctl(READ, 0x83, 312)
SET_SREGS = _ioctl(WRITE, 0x84, 312)
SET_CPUID2 = _ioctl(WRITE, 0x90, 8)

LOG_DIRTY_PAGES = 1  # KVM_MEM_LOG_DIRTY_PAGES, a flag of the slot
CPUID_ENTRIES, CPUID_ENTRY = 256, 40  # octets a kvm_cpuid_entry2

#: struct kvm_regs, 8 octets each.
REGISTERS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
)
REGS_LENGTH, SREGS_LENGTH = 8 * len(REGISTERS), 312

# Of struct kvm_run, which the vCPU's descriptor maps.
IMMEDIATE_EXIT, EXIT_REASON = 1, 8

libc = ctypes.CDLL(None, use_errno=True)


class Exit(IntEnum):
    """Why a vCPU came back (KVM_EXIT_*)."""

    IO = 2
    SHUTDOWN = 8
    INTERRUPTED = -1  # not KVM's: it was told to come back at once


def control(fd: int, request: int, structure: bytearray | None = None) -> int:
    """Call ioctl, without the interpreter's lock: `fcntl.ioctl` may try again by itself. Raises `OSError`."""
    argument = ctypes.c_ulong(0) if structure is None else ctypes.byref(ctypes.c_char.from_buffer(structure))
    result: int = libc.ioctl(fd, ctypes.c_ulong(request), argument)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), DEVICE)
    return result


class Vm:
    """A virtual machine whose memory starts at physical address 0, with one vCPU that a thread runs.

    The vCPU has to leave the guest now and then by ``out``: only there can it be stopped.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        kvm = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        self._descriptors = [kvm]
        self._vm = self._own(control(kvm, CREATE_VM))
        self.log_dirty_pages(False)
        self._vcpu = self._own(control(self._vm, CREATE_VCPU))
        self._run = mmap.mmap(self._vcpu, control(kvm, GET_VCPU_MMAP_SIZE))
        cpuid = bytearray(struct.pack("<II", CPUID_ENTRIES, 0) + bytes(CPUID_ENTRIES * CPUID_ENTRY))
        control(kvm, GET_SUPPORTED_CPUID, cpuid)
        control(self._vcpu, SET_CPUID2, cpuid)
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.last_exit = Exit.INTERRUPTED

    def _own(self, fd: int) -> int:
        self._descriptors.append(fd)
        return fd

    def close(self) -> None:
        """End the machine."""
        self.stop()
        self._run.close()
        for fd in reversed(self._descriptors):
            os.close(fd)

    # Memory

    def log_dirty_pages(self, enabled: bool) -> None:
        """Set the slot's flag: the log starts empty."""
        flags = LOG_DIRTY_PAGES if enabled else 0
        size, address = len(self.memory.octets), self.memory.pages.ctypes.data
        control(
            self._vm, SET_USER_MEMORY_REGION, bytearray(struct.pack("<IIQQQ", 0, flags, 0, size, address))
        )

    def take_dirty_log(self, into: PfnBitmap) -> None:
        """Replace ``into`` by the log, and start an empty one: KVM knows no other way to read it."""
        control(self._vm, GET_DIRTY_LOG, bytearray(struct.pack("<IIQ", 0, 0, into.words.ctypes.data)))

    # The vCPU

    @property
    def state(self) -> bytes:
        """All that a vCPU without FPU, interrupts and devices has: struct kvm_regs and kvm_sregs."""
        regs, sregs = bytearray(REGS_LENGTH), bytearray(SREGS_LENGTH)
        control(self._vcpu, GET_REGS, regs)
        control(self._vcpu, GET_SREGS, sregs)
        return bytes(regs + sregs)

    @state.setter
    def state(self, state: bytes) -> None:
        control(self._vcpu, SET_SREGS, bytearray(state[REGS_LENGTH:]))
        control(self._vcpu, SET_REGS, bytearray(state[:REGS_LENGTH]))

    @property
    def registers(self) -> dict[str, int]:
        """The general registers by name. The vCPU is stopped."""
        values = struct.unpack_from(f"<{len(REGISTERS)}Q", self.state)
        return dict(zip(REGISTERS, values, strict=True))

    @property
    def running(self) -> bool:
        """Whether a thread runs the vCPU."""
        return self._thread is not None

    def start(self, pause_s: float) -> None:
        """Run the vCPU in a thread, which sleeps ``pause_s`` at each ``out``."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run_vcpu, args=(pause_s,), name="vcpu", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the vCPU behind an ``out``."""
        if self._thread is not None:
            self._stopping = True
            self._thread.join()
            self._thread = None

    def _run_vcpu(self, pause_s: float) -> None:
        while not self._stopping and self._enter() is Exit.IO:
            time.sleep(pause_s)
        # An ``out`` is complete only at the next entry: until then rip still points at it.
        self._run[IMMEDIATE_EXIT] = 1
        self._enter()
        self._run[IMMEDIATE_EXIT] = 0

    def _enter(self) -> Exit:
        try:
            control(self._vcpu, RUN)
        except OSError as exc:
            if exc.errno != errno.EINTR:
                raise
            return Exit.INTERRUPTED
        (reason,) = struct.unpack_from("<I", self._run, EXIT_REASON)
        self.last_exit = Exit(reason)
        return self.last_exit
