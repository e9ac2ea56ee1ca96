"""What restore refuses in single records: lengths, as one table, and how a refusal tells its place.

Source: the length checks of tools/libs/guest/xg_sr_restore*.c and xg_sr_common_x86.c. Where a record may
stand is `migstream.layout`'s; what holds a PV guest together is `migstream.engines.restore_pv`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from migstream.errors import FormatError
from migstream.io.reader import Frame, Layer
from migstream.layout import Layout
from migstream.records import MAX_RECORD_LENGTH, Record, libxc
from migstream.records.libxc import GuestType

__all__ = [
    "CONTEXT_RULES",
    "LENGTH_RULES",
    "LengthRule",
    "check_headers",
    "check_length",
    "check_place",
    "check_record_limit",
    "refusal",
]

PAGE_SHIFT = 12
VERSIONS = (2, 3)


@dataclass(frozen=True)
class LengthRule:
    """Which lengths are taken, in octets."""

    minimum: int = 0
    maximum: int = MAX_RECORD_LENGTH
    multiple_of: int = 1

    def problem(self, length: int) -> str | None:
        """Say what is wrong with ``length``, if anything is."""
        if self.minimum <= length <= self.maximum and length % self.multiple_of == 0:
            return None
        return f"expected {self._expected()} octets, found {length}"

    def _expected(self) -> str:
        if self.minimum == self.maximum:
            return f"exactly {self.minimum}"
        if self.multiple_of > 1:
            return f"a multiple of {self.multiple_of}{', not 0,' if self.minimum else ''}"
        if self.maximum < MAX_RECORD_LENGTH:
            return f"at most {self.maximum}"
        return f"at least {self.minimum}"


def _exactly(length: int) -> LengthRule:
    return LengthRule(length, length)


_VCPU_HEAD = LengthRule(minimum=libxc.VcpuRecord.head_size)

#: What a record's body has to measure. What counts something (HVM_PARAMS, P2M_FRAMES, PAGE_DATA) is
#: measured against its count where it is taken.
LENGTH_RULES: dict[type[Record], LengthRule] = {
    libxc.X86CpuidPolicy: LengthRule(minimum=24, multiple_of=24),
    libxc.X86MsrPolicy: LengthRule(minimum=16, multiple_of=16),
    libxc.X86TscInfo: _exactly(24),
    libxc.HvmContext: LengthRule(minimum=1),
    libxc.HvmParams: LengthRule(minimum=8),
    libxc.X86PvInfo: LengthRule(minimum=8),
    libxc.X86PvP2mFrames: LengthRule(minimum=8),
    libxc.X86PvVcpuBasic: _VCPU_HEAD,
    libxc.X86PvVcpuExtended: _VCPU_HEAD,
    libxc.X86PvVcpuXsave: _VCPU_HEAD,
    libxc.X86PvVcpuMsrs: _VCPU_HEAD,
    libxc.SharedInfo: _exactly(4096),
    libxc.Origin: LengthRule(minimum=libxc.Origin.head_size),
}

#: The same for the state within a VCPU record; BASIC's depends on the guest's word size.
CONTEXT_RULES: dict[type[libxc.VcpuRecord], LengthRule] = {
    libxc.X86PvVcpuExtended: LengthRule(maximum=128),
    libxc.X86PvVcpuXsave: LengthRule(minimum=16),
    libxc.X86PvVcpuMsrs: LengthRule(multiple_of=16),
}


def refusal(frame: Frame, message: str, *, field: str | None = None, at: int = 0) -> FormatError:
    """Make the error that refuses ``frame``; ``at`` is where in its body."""
    return FormatError(
        message, offset=frame.body_offset + at, layer=frame.layer.name, record=frame.ref, field=field
    )


def check_headers(layer: Layer, guest: GuestType) -> tuple[libxc.ImageHeader, libxc.DomainHeader]:
    """Return the headers of the libxc layer; raise `FormatError` if a ``guest`` cannot be made from it.

    Xen takes a page_shift of 44 for 12, by an overflow; here only 12 is.
    """
    image = layer.header(libxc.ImageHeader)
    domain = layer.header(libxc.DomainHeader)
    assert image is not None  # a libxc layer is its two headers
    assert domain is not None
    found = GuestType(domain.type).name if domain.type in set(GuestType) else f"type {domain.type}"
    checks = (
        (
            image.version in VERSIONS,
            "version",
            f"expected version 2 or 3, found {image.version}",
            "a legacy (version 1) image has to be converted first" if image.version == 1 else None,
        ),
        (
            image.order == "little",
            "options",
            "expected a little-endian image, found a big-endian one",
            "only a big-endian machine can restore it",
        ),
        (
            domain.type == guest,
            "type",
            f"expected the image of an {guest.name} guest, found one of {found}",
            f"restore it into a guest of type {found.lower()}" if domain.type in set(GuestType) else None,
        ),
        (
            domain.page_shift == PAGE_SHIFT,
            "page_shift",
            f"expected pages of 4096 octets (page_shift {PAGE_SHIFT}), found page_shift {domain.page_shift}",
            None,
        ),
    )
    for passed, field, message, hint in checks:
        if not passed:
            raise FormatError(message, offset=layer.offset, layer=layer.name, field=field, hint=hint)
    return image, domain


def check_record_limit(frame: Frame) -> None:
    """Refuse a record longer than Xen reads; raises `FormatError`."""
    if frame.length > MAX_RECORD_LENGTH:
        raise refusal(
            frame,
            f"a record of {frame.length} octets: the limit is {MAX_RECORD_LENGTH}",
            field="length",
            at=-4,
        )


def check_place(frame: Frame, kind: type[Record], layout: Layout) -> list[str]:
    """Refuse a record that may not stand here; return warnings about one that restore does not use."""
    problems = layout.problems(kind)
    if problems and problems[0].enforced:
        raise refusal(frame, problems[0].message)
    late = kind in (libxc.X86CpuidPolicy, libxc.X86MsrPolicy) and layout.static_data_ended
    return (
        [f"{frame.ref.type} at offset {frame.offset} comes after STATIC_DATA_END: not applied"]
        if late
        else []
    )


def check_length(frame: Frame, kind: type[Record]) -> None:
    """Refuse a record whose body is too short or too long for its type; raises `FormatError`."""
    rule = LENGTH_RULES.get(kind)
    problem = rule.problem(frame.length) if rule else None
    if problem:
        raise refusal(frame, problem, field="length", at=-4)
