"""``model:SIZE``: a machine in this process's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum

from migstream.guests.kind import GuestKind, GuestSpec, Option
from migstream.guests.protocols import PAGE_SIZE, RestoreTarget, SaveSource
from migstream.records.libxc import GuestType

__all__ = ["KIND"]


class OnSuspend(Enum):
    """What the guest does when it is asked to suspend."""

    OBEY = "obey"
    REFUSE = "refuse"
    IGNORE = "ignore"


@contextmanager
def _source(spec: GuestSpec, guest_type: GuestType) -> Iterator[SaveSource]:
    from migstream.guests.model import ModelGuest, SuspendAnswer
    from migstream.guests.workload import Workload

    answer = {
        OnSuspend.OBEY: SuspendAnswer.SUSPENDS,
        OnSuspend.REFUSE: SuspendAnswer.REFUSES,
        OnSuspend.IGNORE: SuspendAnswer.SILENT,
    }[spec.choice("suspend", OnSuspend.OBEY)]
    busy = spec.integer("busy", 0)
    working_set = spec.size("working-set", 16 << 20) // PAGE_SIZE
    guest = ModelGuest.booted(
        spec.pages(),
        spec.guest_type(guest_type),
        seed=spec.integer("seed", 0),
        vcpus=spec.integer("vcpus", 2),
        holes=spec.yes("holes", True),
    )
    guest.suspend_request = lambda: answer
    with ExitStack() as running:
        if busy:
            running.enter_context(Workload(guest, pages_per_second=busy, working_set=working_set))
        yield guest


@contextmanager
def _target(spec: GuestSpec, guest_type: GuestType) -> Iterator[RestoreTarget]:
    from migstream.guests.model import ModelGuest

    # Frames that differ from those of a source with the same seed: as on another host.
    yield ModelGuest.empty(spec.pages(), spec.guest_type(guest_type), seed=spec.integer("seed", 0) + 1)


KIND = GuestKind(
    name="model",
    what="SIZE",
    example="model:64M",
    help="a machine in this process's memory, gone when the command ends",
    source=_source,
    target=_target,
    options=(
        Option("guest-type", "pv", "pv or hvm; default: as --guest-type says"),
        Option("seed", "3", "what its memory, page types and registers follow from; default 0"),
        Option("vcpus", "4", "processors that it boots with; default 2"),
        Option("holes", "no", "whether it has ballooned, broken and allocate-only pages; default yes"),
        Option("busy", "20000", "pages a second that it writes while it runs; default 0"),
        Option("working-set", "16M", "memory that those writes go to; default 16M"),
        Option("suspend", "refuse", "what it does when asked to suspend: obey, refuse or ignore"),
    ),
)
