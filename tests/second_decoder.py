"""A second decoder of streams, on `struct` and the specification alone: it shares no code with migstream.

It knows libxc images, libxl streams, and the xl, libvirt and xapi envelopes around them; no compressed file
and no legacy stream. What it says of a record is what `migstream inspect` would: the decoded JSON of the
conformance corpus is held against it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import Any

CHECKPOINT, CHECKPOINT_END, CHECKPOINT_STATE, LIBXC_CONTEXT = 14, 4, 5, 1

#: Layer and code of a record -> its fixed fields, each ``name:struct character``, and what follows them:
#: ``name`` for octets, ``name[fields]`` for entries (``name[]``: words of 8), ``*count`` where counted.
FORMS = {
    ("libxc", 0): ("", ""),
    ("libxc", 2): ("guest_width:B pt_levels:B reserved1:6s", ""),
    ("libxc", 3): ("p2m_start_pfn:I p2m_end_pfn:I", "p2m_pfns[]"),
    ("libxc", 4): ("vcpu_id:I reserved1:I", "context"),
    ("libxc", 5): ("vcpu_id:I reserved1:I", "context"),
    ("libxc", 6): ("vcpu_id:I reserved1:I", "context"),
    ("libxc", 7): ("", "shared_info"),
    ("libxc", 8): ("mode:I khz:I nsec:Q incarnation:I reserved1:I", ""),
    ("libxc", 9): ("", "hvm_ctx"),
    ("libxc", 10): ("count:I reserved1:I", "params[index:Q value:Q]*count"),
    ("libxc", 11): ("", "data"),
    ("libxc", 12): ("vcpu_id:I reserved1:I", "context"),
    ("libxc", 13): ("", ""),
    ("libxc", 14): ("", ""),
    ("libxc", 15): ("", "pfns[]"),
    ("libxc", 16): ("", ""),
    ("libxc", 17): ("", "leaves[leaf:I subleaf:I a:I b:I c:I d:I]"),
    ("libxc", 18): ("", "msrs[idx:I flags:I val:Q]"),
    ("libxc", 0xCD53_0001): ("hypervisor:I vcpus:I ram_size:Q ram_below_4g:Q ram_above_base:Q", "data"),
    ("libxl", 0): ("", ""),
    ("libxl", 1): ("", ""),
    ("libxl", 2): ("emulator_id:I index:I", "data"),
    ("libxl", 3): ("emulator_id:I index:I", "emulator_ctx"),
    ("libxl", 4): ("", ""),
    ("libxl", 5): ("control_id:I", ""),
}
PAGE_TYPES = ["NOTAB", "L1TAB", "L2TAB", "L3TAB", "L4TAB", "RESERVED_5", "RESERVED_6", "RESERVED_7"]
PAGE_TYPES += ["RESERVED_8", "L1TAB_PIN", "L2TAB_PIN", "L3TAB_PIN", "L4TAB_PIN", "BROKEN", "XALLOC", "XTAB"]
SHORT = 1 << 16  # octets of the longest body whose fields are told


def records(octets: bytes) -> Iterator[dict[str, Any]]:
    """Yield the libxc and libxl records of a stream until it ends or is not one any more."""
    at = content_offset(octets)
    layer, libxl_order, after_checkpoint, image_open = "", "", False, False
    while True:
        if layer == "":
            if octets[at : at + 8] == b"LibxlFmt" and len(octets) >= at + 16 and not libxl_order:
                libxl_order = "<>"[struct.unpack_from(">I", octets, at + 12)[0] & 1]
                layer, at = "libxl", at + 16
            elif octets[at : at + 12] == b"\xff" * 8 + b"XENF" and len(octets) >= at + 40:
                order = "<>"[struct.unpack_from(">H", octets, at + 16)[0] & 1]
                layer, at, image_open = "libxc", at + 40, True
            else:
                return
        mark = libxl_order if layer == "libxl" else order
        if len(octets) < at + 8:
            return
        code, length = struct.unpack_from(mark + "II", octets, at)
        end = at + 8 + length + -length % 8
        colo = after_checkpoint and code == CHECKPOINT_STATE and length in {4, 8}
        name = "libxl" if colo else layer
        told = {"offset": at, "layer": name, "code": code, "length": length}
        found = octets[at + 8 : at + 8 + length]
        if (name, code) == ("libxc", 1):
            told |= pages(found, mark)
        elif length <= SHORT:
            told |= fields_of(name, code, found, mark) if len(found) == length else {"malformed": True}
        yield told
        at, after_checkpoint = end, False
        if name == "libxl":
            if code == 0:
                return
            if code == LIBXC_CONTEXT:
                layer = ""
            elif code == CHECKPOINT_END and image_open:
                layer, after_checkpoint = "libxc", True
            elif colo:
                after_checkpoint = True
        elif code in {0, CHECKPOINT}:
            image_open = code == CHECKPOINT
            if libxl_order:
                layer = "libxl"
            elif not image_open:
                return


def content_offset(octets: bytes) -> int:
    """Return where the libxl stream or libxc image begins in its envelope, or where it would."""
    if len(octets) < 64:
        return 0
    if octets.startswith(b"Xen saved domain, xl format\n"):
        mark = "<" if octets[32:36] == b"\4\3\2\1" else ">"
        return 48 + int(struct.unpack_from(mark + "I", octets, 44)[0])
    if octets.startswith(b"libvirt-xml\n"):
        return 64 + int(struct.unpack_from("<I", octets, 20)[0])
    if octets.startswith(b"XenSavedDomv2-\n"):
        at, code = 15, 0
        while code not in {0xF0, 0xF1} and len(octets) >= at + 16:
            code, length = struct.unpack_from("<qq", octets, at)
            at += 16 + (length if code not in {0xF0, 0xF1} else 0)
        return at
    return 0


def fields_of(layer: str, code: int, octets: bytes, mark: str) -> dict[str, Any]:
    """Return ``fields`` or ``malformed`` of a record."""
    if (layer, code) not in FORMS:
        return {"fields": {"layer": layer, "type_code": code, "body": shown(octets)}}
    head, tail = FORMS[layer, code]
    names, form = [field.split(":") for field in head.split()], mark
    form += "".join(character for _, character in names)
    if len(octets) < struct.calcsize(form):
        return {"malformed": True}
    values = struct.unpack_from(form, octets)
    fields: dict[str, Any] = {
        name: value.hex() if isinstance(value, bytes) else value
        for (name, _), value in zip(names, values, strict=True)
    }
    rest = octets[struct.calcsize(form) :]
    if "[" in tail:
        name, _, inner = tail.partition("[")
        inner, _, counted = inner.partition("]")
        parts = [field.split(":") for field in inner.split()]
        entry = struct.Struct(mark + ("".join(character for _, character in parts) or "Q"))
        count = fields[counted[1:]] if counted else len(rest) // entry.size
        if count * entry.size > len(rest):
            return {"malformed": True}
        unpacked = [entry.unpack_from(rest, i * entry.size) for i in range(count)]
        keys = [name for name, _ in parts]
        fields[name] = [dict(zip(keys, row, strict=True)) if keys else row[0] for row in unpacked]
        rest = rest[count * entry.size :]
    elif tail:
        fields[tail], rest = shown(rest), b""
    if rest:
        fields["surplus"] = shown(rest)
    return {"fields": fields}


def pages(octets: bytes, mark: str) -> dict[str, Any]:
    """Return what PAGE_DATA lists: entries by type, the lowest and the highest PFN."""
    if len(octets) < 8 or len(octets) < 8 + 8 * struct.unpack_from(mark + "I", octets)[0]:
        return {"malformed": True}
    count = struct.unpack_from(mark + "I", octets)[0]
    entries = struct.unpack_from(f"{mark}{count}Q", octets, 8)
    by_type: dict[str, int] = {}
    for entry in entries:
        name = PAGE_TYPES[entry >> 60]
        by_type[name] = by_type.get(name, 0) + 1
    pfns = [entry & (1 << 52) - 1 for entry in entries]
    return {
        "pages": {"by_type": by_type, "pfn_min": min(pfns, default=None), "pfn_max": max(pfns, default=None)}
    }


def shown(octets: bytes) -> Any:
    """Return octets as the corpus shows them."""
    if len(octets) <= 64:
        return octets.hex()
    return {"octets": len(octets), "sha256": hashlib.sha256(octets).hexdigest()}
