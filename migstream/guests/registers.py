"""The registers of a guest's processors, as the records of a stream hold them.

PV: the body of X86_PV_VCPU_BASIC, struct vcpu_guest_context (xen/include/public/arch-x86/xen.h, xen-x86_64.h
and xen-x86_32.h). HVM: the CPU entries of HVM_CONTEXT, struct hvm_hw_cpu (arch-x86/hvm/save.h). Both become
one mapping of names to values, from which the notes of a core dump are made.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence

from migstream.guests.state_book import StateBook
from migstream.records import libxc
from migstream.records.pv_state import CONTEXT_ONLINE, PV_LAYOUTS, Integer

__all__ = ["Registers", "guest_contexts", "hvm_entries", "processors"]

#: A processor's registers by name, those of 64 bits (a 32-bit guest's are zero-extended).
Registers = Mapping[str, int]

HVM_CPU = 2  # the typecode of struct hvm_hw_cpu
IN_KERNEL = 1 << 2  # VGCF_in_kernel, a bit of vcpu_guest_context.flags


def _table(offset: int, size: int, names: str, step: int | None = None) -> dict[str, Integer]:
    step = size if step is None else step
    return {name: Integer(offset + i * step, size) for i, name in enumerate(names.split())}


_PV64 = (
    _table(520, 8, "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi")
    | _table(648, 8, "rip")
    | _table(656, 2, "cs")
    | _table(664, 8, "rflags rsp")
    | _table(680, 2, "ss es ds fs gs", step=8)
    | _table(4984, 8, "cr0 cr1 cr2 cr3 cr4")
    | _table(5144, 8, "fs_base gs_base_kernel gs_base_user")
)
_PV32 = (
    _table(516, 4, "rbx rcx rdx rsi rdi rbp rax")
    | _table(548, 4, "rip")
    | _table(552, 2, "cs")
    | _table(556, 4, "rflags rsp")
    | _table(564, 2, "ss es ds fs gs", step=4)
    | _table(2716, 4, "cr0 cr1 cr2 cr3 cr4")
)
_PV = {4: _PV32, 8: _PV64}
_HVM = (
    _table(512, 8, "rax rbx rcx rdx rbp rsi rdi rsp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags cr0 cr2 cr3 cr4")
    | _table(736, 4, "cs ds es fs gs ss")
    | _table(832, 8, "fs_base gs_base")
    | _table(944, 8, "shadow_gs")
)
_HVM_SIZE = 952  # octets up to the last of these


def hvm_entries(context: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield the entries of an HVM_CONTEXT: typecode, instance (the vCPU), body. A cut entry ends them."""
    at = 0
    while at + 8 <= len(context):
        code, instance, length = struct.unpack_from("<HHI", context, at)
        body = context[at + 8 : at + 8 + length]
        if len(body) < length:
            return
        yield code, instance, body
        at += 8 + length


def processors(state: StateBook) -> Sequence[Registers]:
    """Return the registers of each vCPU whose registers ``state`` has, in the order of vCPUs."""
    found: dict[int, Registers] = {}
    width = state.pv_layout.guest_width
    for record in state.state:
        if (
            isinstance(record, libxc.X86PvVcpuBasic)
            and len(record.context) == PV_LAYOUTS[width].vcpu_context.size
        ):
            found[record.vcpu_id] = _pv(record.context, width)
        elif isinstance(record, libxc.HvmContext):
            for code, instance, body in hvm_entries(record.hvm_ctx):
                if code == HVM_CPU and len(body) >= _HVM_SIZE:
                    found[instance] = _hvm(body)
    return [found[vcpu] for vcpu in sorted(found)]


def guest_contexts(state: StateBook) -> Sequence[bytes]:
    """Return a struct vcpu_guest_context for each vCPU: a PV guest's own, or made of an HVM vCPU's registers.

    Those of a 32-bit PV guest have 2800 octets, all others 5168.
    """
    own = [r for r in state.state if isinstance(r, libxc.X86PvVcpuBasic)]
    size = state.pv_layout.vcpu_context.size
    if own:
        return [r.context for r in sorted(own, key=lambda r: r.vcpu_id) if len(r.context) == size]
    return [_context_of(registers) for registers in processors(state)]


def _pv(context: bytes, width: int) -> Registers:
    values = {name: where.get(context) for name, where in _PV[width].items()}
    in_kernel = PV_LAYOUTS[width].vcpu_context.flags.get(context) & IN_KERNEL
    values["gs_base"] = values.get("gs_base_kernel" if in_kernel else "gs_base_user", 0)
    return values


def _hvm(body: bytes) -> Registers:
    values = {name: where.get(body) for name, where in _HVM.items()}
    active, other = values["gs_base"], values["shadow_gs"]
    in_kernel = not values["cs"] & 3
    values["gs_base_kernel"], values["gs_base_user"] = (active, other) if in_kernel else (other, active)
    return values


def _context_of(registers: Registers) -> bytes:
    layout = PV_LAYOUTS[8].vcpu_context
    context = bytearray(layout.size)
    for name, where in _PV64.items():
        where.set(context, registers.get(name, 0) & (1 << 8 * where.size) - 1)
    layout.flags.set(context, CONTEXT_ONLINE | (0 if registers["cs"] & 3 else IN_KERNEL))
    return bytes(context)
