"""Every kind of guest by name: from ``model:1G,guest-type=pv`` to something to save from or restore to.

To add a kind, write a file with a `GuestKind` named ``KIND`` and add a line to `MODULES`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module

from migstream.guests.kind import GuestKind, GuestSpec, GuestSpecError
from migstream.guests.protocols import RestoreTarget, SaveSource
from migstream.records.libxc import GuestType

__all__ = ["MODULES", "describe", "kind", "names_guest", "open_source", "open_target", "parse"]

#: Name of a kind -> the module that declares it.
MODULES = {
    "model": "migstream.guests.kind_model",
    "raw": "migstream.guests.kind_raw",
    "elf": "migstream.guests.kind_elf",
    "core": "migstream.guests.kind_core",
    "lime": "migstream.guests.kind_lime",
    "qemu": "migstream.guests.kind_qemu",
    "process": "migstream.guests.kind_process",
}


def kind(name: str) -> GuestKind:
    """Return the kind called ``name``. Raises `GuestSpecError` with a list of all if there is none."""
    if name not in MODULES:
        raise GuestSpecError(f"there is no kind of guest {name!r}; a GUEST is {_examples()}")
    found: GuestKind = import_module(MODULES[name]).KIND
    return found


def describe() -> str:
    """Return a line on each kind, and one on each of its options: for ``--help``."""
    lines = []
    for found in map(kind, MODULES):
        lines.append(f"  {found.name}:{found.what}  {found.help}")
        lines += [f"      ,{option.name}={option.example}  {option.help}" for option in found.options]
    return "\n".join(lines)


def names_guest(text: str) -> bool:
    """Whether ``text`` is a guest by name, such as ``raw:memory.bin``, rather than a file's own."""
    return ":" in text and text.partition(":")[0] in MODULES


def parse(text: str) -> GuestSpec:
    """Take ``KIND:WHAT[,option=value...]`` apart. Raises `GuestSpecError`."""
    name, has_kind, rest = text.partition(":")
    if not has_kind:
        raise GuestSpecError(f"{text!r} names no guest; a GUEST is {_examples()}")
    return kind(name).parse(rest)


def open_source(text: str, guest_type: GuestType = GuestType.HVM) -> AbstractContextManager[SaveSource]:
    """Return the guest that ``text`` names, to save from; its option ``guest-type`` overrides ``guest_type``.

    Raises `GuestSpecError` for a string that names none, here or on entering; `GuestError` and `OSError`
    on entering.
    """
    spec = parse(text)
    if spec.kind.source is None:
        raise GuestSpecError(f"a guest of the kind {spec.kind.name} can only be restored to, not saved")
    return spec.kind.source(spec, guest_type)


def open_target(text: str, guest_type: GuestType = GuestType.HVM) -> AbstractContextManager[RestoreTarget]:
    """Return the guest that ``text`` names, to restore to; as `open_source`.

    On leaving the ``with`` statement, a target that was not completed is discarded.
    """
    spec = parse(text)
    if spec.kind.target is None:
        raise GuestSpecError(f"a guest of the kind {spec.kind.name} can only be saved, not restored to")
    return spec.kind.target(spec, guest_type)


def _examples() -> str:
    return " or ".join(f"{found.name}:{found.what} ({found.example})" for found in map(kind, MODULES))
