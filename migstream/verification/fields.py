"""Field rules: what is in one record, whatever stands around it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from migstream.errors import FormatError
from migstream.records import Record, libxc, libxl
from migstream.records.hvm_params import HvmParam

__all__ = ["Complaint", "check_fields"]

#: (rule id, message)
Complaint = tuple[str, str]

PAGE_SIZE = 4096
BASIC_SIZES = {4: 2800, 8: 5168}  # vcpu_guest_context of 32-bit and 64-bit guests
EXTENDED_MAX = 128  # xen_domctl_ext_vcpucontext
XSAVE_MIN = 16  # two feature masks
VCPU_MSR_SIZE = 16  # xen_domctl_vcpu_msr
KEY = re.compile(r"[A-Za-z0-9\-/_@]+")
ENTRIES_CHECKED = 65536  # entries of one record that are looked at one by one
VALUE = re.compile(r"[\x20-\x7e]*")


def check_fields(record: Record, guest_width: int | None) -> Iterator[Complaint]:
    """Yield what the fields of ``record`` break. ``guest_width`` is X86_PV_INFO's, where it was seen."""
    for wire, value in record.reserved_fields():
        shown = value.hex() if isinstance(value, bytes) else f"{value:#x}"
        yield "reserved-field", f"{wire.name} is {shown}, not zero"
    check = _CHECKS.get(type(record))
    if check is not None:
        yield from check(record, guest_width)
    elif record.surplus and not record.wire_fields:
        yield "body-surplus", f"a body of {len(record.surplus)} octets; {record.type} has none"
    if record.surplus and record.wire_fields and type(record) not in _EXACT:
        yield "body-surplus", f"{len(record.surplus)} octets behind the last field"


def _pv_info(record: libxc.X86PvInfo, _: int | None) -> Iterator[Complaint]:
    if (record.guest_width, record.pt_levels) not in {(4, 3), (8, 4)}:
        yield "pv-info", f"guest_width {record.guest_width} with pt_levels {record.pt_levels}"


def _p2m_frames(record: libxc.X86PvP2mFrames, guest_width: int | None) -> Iterator[Complaint]:
    start, end = record.p2m_start_pfn, record.p2m_end_pfn
    if start > end:
        yield "p2m-range", f"p2m_start_pfn {start:#x} is above p2m_end_pfn {end:#x}"
        return
    if end == 0:
        yield "p2m-range", "p2m_end_pfn is 0: the guest would have a single page"
    if guest_width in BASIC_SIZES:
        per_frame = PAGE_SIZE // guest_width
        expected = end // per_frame - start // per_frame + 1
        if len(record.p2m_pfns) != expected or record.surplus:
            found = 8 * len(record.p2m_pfns) + len(record.surplus)
            yield (
                "p2m-length",
                f"PFNs {start:#x} to {end:#x} take {expected} frames, {8 * expected} octets; found {found}",
            )


def _vcpu(record: libxc.VcpuRecord, guest_width: int | None) -> Iterator[Complaint]:
    size = len(record.context)
    if not size:
        yield "vcpu-empty", f"no context of vCPU {record.vcpu_id}"
        return
    wrong = None
    match record:
        case libxc.X86PvVcpuBasic():
            expected = BASIC_SIZES.get(guest_width or 0)
            if expected is not None and size != expected:
                wrong = f"{expected} octets for a {8 * (guest_width or 0)}-bit guest"
        case libxc.X86PvVcpuExtended():
            if size > EXTENDED_MAX:
                wrong = f"at most {EXTENDED_MAX} octets"
        case libxc.X86PvVcpuXsave():
            if size < XSAVE_MIN:
                wrong = f"at least {XSAVE_MIN} octets"
        case libxc.X86PvVcpuMsrs():
            if size % VCPU_MSR_SIZE:
                wrong = f"a multiple of {VCPU_MSR_SIZE} octets"
    if wrong:
        yield "vcpu-context-size", f"the context of vCPU {record.vcpu_id} is {wrong}; found {size}"


def _shared_info(record: libxc.SharedInfo, _: int | None) -> Iterator[Complaint]:
    if len(record.shared_info) != PAGE_SIZE:
        yield (
            "body-length",
            f"the shared info is one page, {PAGE_SIZE} octets; found {len(record.shared_info)}",
        )


def _tsc_info(record: libxc.X86TscInfo, _: int | None) -> Iterator[Complaint]:
    if record.surplus:
        yield "body-length", f"the body is 24 octets; found {24 + len(record.surplus)}"
    if record.mode not in set(libxc.TscMode):
        yield "tsc-mode", f"mode {record.mode}"


def _hvm_context(record: libxc.HvmContext, _: int | None) -> Iterator[Complaint]:
    if not record.hvm_ctx:
        yield "body-length", "the context is empty"


def _hvm_params(record: libxc.HvmParams, _: int | None) -> Iterator[Complaint]:
    if record.surplus:
        expected = 8 + 16 * record.count
        yield (
            "body-length",
            f"{record.count} parameters take {expected} octets; found {expected + len(record.surplus)}",
        )
    if not record.count:
        yield "hvm-params-empty", "no parameter"
        return
    if record.count > ENTRIES_CHECKED:
        yield "body-unusual", f"{record.count} parameters"
        return
    seen = Counter(entry.index for entry in record.params)
    for index, times in seen.items():
        if index not in set(HvmParam):
            yield "hvm-param-unknown", f"index {index}"
        if times > 1:
            yield "hvm-param-repeated", f"index {index} occurs {times} times"


def _policy(record: libxc.X86CpuidPolicy | libxc.X86MsrPolicy, _: int | None) -> Iterator[Complaint]:
    entries = record.leaves if isinstance(record, libxc.X86CpuidPolicy) else record.msrs
    found = len(entries.raw) + len(record.surplus)
    if not len(entries) or record.surplus:
        yield "body-length", f"the body is a positive multiple of {entries.size} octets; found {found}"
    if len(entries) > ENTRIES_CHECKED:
        yield "body-unusual", f"{len(entries)} entries"
    elif isinstance(record, libxc.X86MsrPolicy):
        for entry in record.msrs:
            if entry.flags:
                yield "reserved-field", f"flags of MSR {entry.idx:#x} are {entry.flags:#x}, not zero"


def _origin(record: libxc.Origin, guest_width: int | None) -> Iterator[Complaint]:
    try:
        _ = record.properties
    except FormatError as exc:
        yield "body-malformed", exc.message


def _xenstore(record: libxl.EmulatorXenstoreData, _: int | None) -> Iterator[Complaint]:
    yield from _emulator(record)
    try:
        pairs = record.pairs
    except FormatError as exc:
        yield "xenstore-malformed", exc.message
        return
    if not pairs:
        yield "emulator-empty", "no key and value"
    for key, value in pairs:
        if not KEY.fullmatch(key) or not VALUE.fullmatch(value):
            yield "xenstore-characters", f"key {key!r} with value {value!r}"


def _emulator_context(record: libxl.EmulatorContext, _: int | None) -> Iterator[Complaint]:
    yield from _emulator(record)
    if not record.emulator_ctx:
        yield "emulator-empty", "no state"


def _emulator(record: libxl.EmulatorXenstoreData | libxl.EmulatorContext) -> Iterator[Complaint]:
    if record.emulator_id not in set(libxl.EmulatorId):
        yield "emulator-unknown", f"emulator id {record.emulator_id}"


def _checkpoint_state(record: libxl.CheckpointState, _: int | None) -> Iterator[Complaint]:
    if record.control_id not in set(libxl.CheckpointStateId):
        yield "libxl-checkpoint-state", f"control id {record.control_id}"
    if record.surplus not in (b"", bytes(4)):
        yield "body-surplus", f"{len(record.surplus)} octets behind the control id"


_CHECKS: dict[type[Record], Callable[[Any, int | None], Iterator[Complaint]]] = {
    libxc.X86PvInfo: _pv_info,
    libxc.X86PvP2mFrames: _p2m_frames,
    libxc.X86PvVcpuBasic: _vcpu,
    libxc.X86PvVcpuExtended: _vcpu,
    libxc.X86PvVcpuXsave: _vcpu,
    libxc.X86PvVcpuMsrs: _vcpu,
    libxc.SharedInfo: _shared_info,
    libxc.X86TscInfo: _tsc_info,
    libxc.HvmContext: _hvm_context,
    libxc.HvmParams: _hvm_params,
    libxc.X86CpuidPolicy: _policy,
    libxc.X86MsrPolicy: _policy,
    libxc.Origin: _origin,
    libxl.EmulatorXenstoreData: _xenstore,
    libxl.EmulatorContext: _emulator_context,
    libxl.CheckpointState: _checkpoint_state,
}

#: Types whose own check speaks of surplus octets, because Xen refuses them.
_EXACT = {
    libxc.X86PvP2mFrames,
    libxc.X86TscInfo,
    libxc.HvmParams,
    libxc.X86CpuidPolicy,
    libxc.X86MsrPolicy,
    libxl.CheckpointState,
}
