"""Which libxc record may stand where: one table, for verify's rules and for the restore engine's checks.

Source: the specification's section Layout; what Xen's own restore code enforces of it
(tools/libs/guest/xg_sr_restore*.c) is marked ``enforced``. Where the specification asks for more than
Xen enforces, verify warns and restore goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from migstream.records import PageData, Record, libxc
from migstream.records.libxc import GuestType

__all__ = ["TABLE", "Kind", "Layout", "Phase", "Place", "Problem", "Required"]

PV = frozenset({GuestType.PV})
HVM = frozenset({GuestType.HVM})
BOTH = PV | HVM
NONE: frozenset[GuestType] = frozenset()


class Phase(Enum):
    """The part of an image that a record belongs to."""

    STATIC = "static data"
    MEMORY = "memory"
    STATE = "state"
    CONTROL = "control"


class Required(Enum):
    """Whether an image without this record is complete."""

    NO = "may be absent"
    USUAL = "a guest cannot run without it, but the specification does not ask for it"
    YES = "must be present"


@dataclass(frozen=True)
class Need:
    """A record that must have come before; ``enforced``: Xen's restore refuses the stream otherwise."""

    record: type[Record]
    enforced: bool


@dataclass(frozen=True)
class Place:
    """Where one record type may stand.

    ``guests``: whose images it may be in. ``needs``: what must have come before. ``once``: a second one
    in an image is refused. ``per_checkpoint``: one for each consistent state (and vCPU) is enough.
    """

    record: type[Record]
    phase: Phase
    guests: frozenset[GuestType]
    needs: tuple[Need, ...] = ()
    once: bool = False
    per_checkpoint: bool = False
    required: Required = Required.NO
    checkpointed_only: bool = False
    back_channel: bool = False
    deprecated: bool = False


_INFO = Need(libxc.X86PvInfo, enforced=True)
_P2M = Need(libxc.X86PvP2mFrames, enforced=True)
_STATIC = Need(libxc.StaticDataEnd, enforced=True)
_STATIC_BY_SPEC = Need(libxc.StaticDataEnd, enforced=False)
_PAGES_BY_SPEC = Need(PageData, enforced=False)
_PARAMS_BY_SPEC = Need(libxc.HvmParams, enforced=False)
_VCPU_NEEDS = (
    _STATIC_BY_SPEC,
    Need(libxc.X86PvInfo, enforced=False),
    Need(libxc.X86PvP2mFrames, enforced=False),
    _PAGES_BY_SPEC,
)

TABLE: dict[type[Record], Place] = {
    place.record: place
    for place in (
        Place(libxc.End, Phase.CONTROL, BOTH),
        Place(PageData, Phase.MEMORY, BOTH, needs=(_STATIC, _P2M), required=Required.YES),
        Place(libxc.X86PvInfo, Phase.STATIC, PV, once=True, required=Required.YES),
        Place(libxc.X86PvP2mFrames, Phase.MEMORY, PV, needs=(_STATIC, _INFO), required=Required.YES),
        Place(
            libxc.X86PvVcpuBasic,
            Phase.STATE,
            PV,
            needs=_VCPU_NEEDS,
            per_checkpoint=True,
            required=Required.YES,
        ),
        Place(libxc.X86PvVcpuExtended, Phase.STATE, PV, needs=_VCPU_NEEDS, per_checkpoint=True),
        Place(libxc.X86PvVcpuXsave, Phase.STATE, PV, needs=_VCPU_NEEDS, per_checkpoint=True),
        Place(
            libxc.SharedInfo,
            Phase.STATE,
            PV,
            needs=(_STATIC_BY_SPEC, _INFO),
            per_checkpoint=True,
            required=Required.USUAL,
        ),
        Place(libxc.X86TscInfo, Phase.STATE, BOTH, needs=(_STATIC_BY_SPEC,), per_checkpoint=True),
        Place(
            libxc.HvmContext,
            Phase.STATE,
            HVM,
            needs=(_STATIC_BY_SPEC, _PARAMS_BY_SPEC),
            per_checkpoint=True,
            required=Required.USUAL,
        ),
        Place(
            libxc.HvmParams,
            Phase.STATE,
            HVM,
            needs=(_STATIC_BY_SPEC,),
            per_checkpoint=True,
            required=Required.USUAL,
        ),
        Place(libxc.Toolstack, Phase.STATE, NONE, deprecated=True),
        Place(libxc.X86PvVcpuMsrs, Phase.STATE, PV, needs=_VCPU_NEEDS, per_checkpoint=True),
        Place(libxc.Verify, Phase.CONTROL, BOTH, needs=(_STATIC_BY_SPEC, _PAGES_BY_SPEC)),
        Place(libxc.Checkpoint, Phase.CONTROL, BOTH, checkpointed_only=True),
        Place(libxc.CheckpointDirtyPfnList, Phase.CONTROL, NONE, back_channel=True),
        Place(libxc.StaticDataEnd, Phase.STATIC, BOTH, once=True, required=Required.YES),
        Place(libxc.X86CpuidPolicy, Phase.STATIC, BOTH),
        Place(libxc.X86MsrPolicy, Phase.STATIC, BOTH),
        Place(libxc.Origin, Phase.STATIC, BOTH),
    )
}


class Kind(Enum):
    """What is wrong with a record's place."""

    FOREIGN = "wrong guest type"
    BACK_CHANNEL = "back channel only"
    DEPRECATED = "deprecated"
    PLAIN = "checkpointed streams only"
    REPEATED = "repeated"
    TOO_EARLY = "something must come before"
    TOO_LATE = "static data after their end"
    MISSING = "absent"


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a place; ``enforced``: Xen's restore refuses the stream for it."""

    kind: Kind
    enforced: bool
    message: str


@dataclass
class Layout:
    """What of one libxc image was seen so far.

    Ask `problems` about each record before `note` takes it into account. ``checkpointed`` is ``None``
    where it is not known whether the stream may hold checkpoints. For a version 2 stream,
    STATIC_DATA_END counts as seen from the record on that `infers_static_data_end` is true of.
    """

    guest: GuestType
    version: int
    checkpointed: bool | None = None
    seen: set[type[Record]] = field(default_factory=set)
    inferred: bool = False
    _in_state: set[tuple[type[Record], int]] = field(default_factory=set)

    @property
    def static_data_ended(self) -> bool:
        """Whether STATIC_DATA_END was seen, or inferred."""
        return libxc.StaticDataEnd in self.seen

    def infers_static_data_end(self, record: type[Record]) -> bool:
        """Whether ``record`` tells the end of static data of a version 2 stream (v3 compat with v2).

        A PV guest's P2M_FRAMES come before its pages; Xen infers from a PAGE_DATA all the same, and then
        refuses it for want of P2M_FRAMES.
        """
        first: set[type[Record]] = {PageData}
        if self.guest is GuestType.PV:
            first.add(libxc.X86PvP2mFrames)
        return self.version < 3 and record in first and not self.static_data_ended

    def problems(self, record: type[Record], vcpu_id: int = 0) -> list[Problem]:
        """Return what is wrong with a record of this type coming next, the gravest first."""
        place = TABLE[record]
        if place.back_channel:
            text = f"{record.type} goes from secondary to primary only, on the back channel"
            return [Problem(Kind.BACK_CHANNEL, True, text)]
        if place.deprecated:
            return [
                Problem(Kind.DEPRECATED, True, f"{record.type} is deprecated, and refused by every restore")
            ]
        if self.guest not in place.guests:
            text = f"{record.type} does not belong into the image of an {self.guest.name} guest"
            return [Problem(Kind.FOREIGN, True, text)]
        found = []
        if place.checkpointed_only and self.checkpointed is False:
            found.append(Problem(Kind.PLAIN, True, f"{record.type} in a stream without checkpoints"))
        if place.once and record in self.seen:
            inferred = " (the first was inferred)" if record is libxc.StaticDataEnd and self.inferred else ""
            found.append(Problem(Kind.REPEATED, True, f"a second {record.type}{inferred}"))
        elif place.per_checkpoint and (record, vcpu_id) in self._in_state:
            of = f" of vCPU {vcpu_id}" if issubclass(record, libxc.VcpuRecord) else ""
            found.append(
                Problem(Kind.REPEATED, False, f"a second {record.type}{of} in one state; the last counts")
            )
        found += [
            Problem(Kind.TOO_EARLY, need.enforced, f"{record.type} before {need.record.type}")
            for need in place.needs
            if self._lacks(record, need.record)
        ]
        if place.phase is Phase.STATIC and record is not libxc.StaticDataEnd and self.static_data_ended:
            found.append(
                Problem(
                    Kind.TOO_LATE,
                    False,
                    f"{record.type} after STATIC_DATA_END is accepted, but never applied",
                )
            )
        return sorted(found, key=lambda problem: not problem.enforced)

    def _lacks(self, record: type[Record], needed: type[Record]) -> bool:
        if needed in self.seen or self.guest not in TABLE[needed].guests:
            return False
        # Version 2 has no STATIC_DATA_END: its place is inferred, and state may stand before it.
        return self.version >= 3 or needed is not libxc.StaticDataEnd

    def note(self, record: type[Record], vcpu_id: int = 0) -> None:
        """Take a record into account."""
        if self.infers_static_data_end(record):
            self.inferred = True
            self.seen.add(libxc.StaticDataEnd)
        self.seen.add(record)
        if record is libxc.Checkpoint:
            self._in_state.clear()
        elif record in TABLE and TABLE[record].per_checkpoint:
            self._in_state.add((record, vcpu_id))

    def missing(self) -> list[Problem]:
        """Return what the image lacks at its end, or at its first checkpoint.

        A machine that names its origin is no Xen domain: its processors are in its emulator's state.
        """
        not_needed = {Required.NO, Required.USUAL} if libxc.Origin in self.seen else {Required.NO}
        return [
            Problem(Kind.MISSING, place.required is Required.YES, f"the image has no {place.record.type}")
            for place in TABLE.values()
            if place.required not in not_needed
            and self.guest in place.guests
            and place.record not in self.seen
            and not (place.record is libxc.StaticDataEnd and self.version < 3)
        ]
