"""``qemu:SOCKET``: a QEMU machine, by its QMP socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from migstream.guests.kind import GuestKind, GuestSpec, GuestSpecError, Option
from migstream.guests.protocols import RestoreTarget, SaveSource
from migstream.records.libxc import GuestType

__all__ = ["KIND"]


@contextmanager
def _source(spec: GuestSpec, guest_type: GuestType) -> Iterator[SaveSource]:
    from migstream.guests.qemu.source import QemuSource

    with QemuSource(spec.what, pid=_pid(spec, guest_type)) as source:
        yield source


@contextmanager
def _target(spec: GuestSpec, guest_type: GuestType) -> Iterator[RestoreTarget]:
    from migstream.guests.qemu.target import QemuTarget

    with QemuTarget(spec.what, pid=_pid(spec, guest_type)) as target:
        yield target


def _pid(spec: GuestSpec, guest_type: GuestType) -> int | None:
    if guest_type is not GuestType.HVM:
        raise GuestSpecError(f"{spec.kind.name}:{spec.what} is an HVM guest; it cannot be a PV one")
    return spec.integer("pid", 0) or None


KIND = GuestKind(
    name="qemu",
    what="SOCKET",
    example="qemu:guest.qmp",
    help="a QEMU machine, by its QMP socket; see docs/qemu.md for how to start one",
    source=_source,
    target=_target,
    options=(Option("pid", "4711", "QEMU's process; default: the one that made the socket"),),
    guest_type=GuestType.HVM,
)
