"""libxl's toolstack data: where QEMU mapped its memory, as xenstore pairs.

Source: libxl_dom.c of Xen 4.4, libxl__toolstack_save and libxl__toolstack_restore.
"""

from __future__ import annotations

import struct

from migstream.errors import FormatError
from migstream.legacy.source import LAYER
from migstream.legacy.state import ToolstackData
from migstream.text import decode

__all__ = ["physmap_pairs"]

VERSION = 1
_HEAD = struct.Struct("<II")  # version, number of mappings
_MAPPING = struct.Struct("<QQQI")  # phys_offset, start_addr, size, length of the name with its NUL


def physmap_pairs(data: ToolstackData, word_size: int) -> list[tuple[str, str]]:
    """Return xenstore keys, relative to the emulator's tree, and values.

    A 64-bit toolstack's structure ends with four octets of padding. The name starts inside it, so these
    octets come behind the name. Raises `FormatError`.
    """
    padding = 4 if word_size == 8 else 0

    def fault(message: str, at: int) -> FormatError:
        return FormatError(message, offset=data.offset + at, layer=LAYER, record=data.record)

    octets = data.octets
    if len(octets) < _HEAD.size:
        raise fault(f"toolstack data of {len(octets)} octets, expected at least {_HEAD.size}", 0)
    version, count = _HEAD.unpack_from(octets)
    if version != VERSION:
        raise fault(f"version {version} of libxl's toolstack data, expected {VERSION}", 0)
    at = _HEAD.size
    pairs = []
    for number in range(count):
        if len(octets) - at < _MAPPING.size:
            raise fault(
                f"mapping {number} of {count} needs {_MAPPING.size} octets, {len(octets) - at} are left", at
            )
        phys, start, size, name_length = _MAPPING.unpack_from(octets, at)
        at += _MAPPING.size
        if len(octets) - at < name_length + padding:
            raise fault(
                f"the name of mapping {number} needs {name_length + padding} octets, "
                f"{len(octets) - at} are left",
                at,
            )
        name = octets[at : at + name_length]
        root = f"physmap/{phys:x}"
        pairs += [(f"{root}/start_addr", f"{start:x}"), (f"{root}/size", f"{size:x}")]
        if name:
            if name.find(0) != name_length - 1:
                raise fault(f"the name of mapping {number} is no string with a NUL at its end: {name!r}", at)
            pairs.append((f"{root}/name", decode(name[:-1])))
        at += name_length + padding
    return pairs
