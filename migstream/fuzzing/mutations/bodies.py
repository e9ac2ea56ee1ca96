"""Mutations of bodies that have a grammar of their own: xenstore pairs, HVM context entries."""

from __future__ import annotations

import struct

from migstream.fuzzing.mutations.editing import Editing
from migstream.records import libxc, libxl

__all__ = ["hvm_entry", "xenstore"]

HVM_ENTRY = struct.Struct("<HHI")  # typecode, instance, length (xen/include/public/hvm/save.h)
XENSTORE_HEAD = libxl.EmulatorXenstoreData.head_size
STRINGS = (
    b"",
    b"/",
    b"..",
    b"../../0/name",
    b"/local/domain/0",
    b"a" * 3072,
    b"a//b",
    b"\xff\xfe",
    b"\x1b[31m",
    b"%n%s",
)


def xenstore(editing: Editing) -> str | None:
    """Damage the keys and values for an emulator."""
    found = editing.record("libxl", libxl.EmulatorXenstoreData.code)
    if found is None or len(found[1].body) < XENSTORE_HEAD:
        return None
    at, record = found
    strings = record.body[XENSTORE_HEAD:].split(b"\0")
    index = editing.chance.randrange(len(strings))
    way = editing.chance.randrange(5)
    if way == 0:
        del strings[index]
        step = f"string {index} dropped"
    elif way == 1:
        strings.insert(index, strings[index])
        step = f"string {index} repeated"
    elif way == 2:
        strings = strings[:-1]
        step = "the last NUL gone"
    else:
        strings[index] = editing.chance.choice(STRINGS)
        step = f"string {index} -> {strings[index][:24]!r}"
    editing.nodes[at] = record.with_body(record.body[:XENSTORE_HEAD] + b"\0".join(strings))
    return f"{editing.name(at)}: {step}"


def hvm_entry(editing: Editing) -> str | None:
    """Damage one entry of an HVM context: type, instance, length, place, or how often it occurs."""
    found = editing.record("libxc", libxc.HvmContext.code)
    if found is None:
        return None
    at, record = found
    entries = _entries(record.body)
    if not entries:
        return None
    index = editing.chance.randrange(len(entries))
    entry = entries[index]
    code, instance, length = HVM_ENTRY.unpack_from(entry)
    way = editing.chance.randrange(6)
    if way == 0:
        code = editing.number(2, code)
        step = f"typecode -> {code}"
    elif way == 1:
        instance = editing.number(2, instance)
        step = f"instance -> {instance}"
    elif way == 2:
        length = editing.number(4, length)
        step = f"length -> {length:#x}"
    elif way == 3:
        entries.insert(index, entry)
        step = "repeated"
    elif way == 4:
        entry = entry[: editing.chance.randrange(len(entry) + 1)]
        step = f"cut to {len(entry)} octets"
    else:
        other = editing.chance.randrange(len(entries))
        entries[index], entries[other] = entries[other], entry
        entry, step = entries[index], f"exchanged with entry {other}"
    if way < 3:
        entry = HVM_ENTRY.pack(code, instance, length) + entry[HVM_ENTRY.size :]
    entries[index] = entry
    editing.nodes[at] = record.with_body(b"".join(entries))
    return f"{editing.name(at)}: entry {index}: {step}"


def _entries(context: bytes) -> list[bytes]:
    """Return the entries, each with its head; octets that make none are left out."""
    found = []
    at = 0
    while at + HVM_ENTRY.size <= len(context):
        end = at + HVM_ENTRY.size + HVM_ENTRY.unpack_from(context, at)[2]
        found.append(context[at:end])
        at = end
    return found
