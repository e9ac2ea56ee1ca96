"""Layers: the headers that say what follows them, read from an input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from migstream.errors import FormatError, StreamError, TruncatedError
from migstream.io.detect import layer_at
from migstream.io.inputs import Input
from migstream.records import ByteOrder, Declaration, libxc, libxl, xl

__all__ = ["Layer", "read_layer"]

MAX_OPTIONAL_DATA = 1 << 20  # octets of config that an xl file may carry; real ones have a few KiB

#: What may stand directly inside a layer.
INSIDE = {"xl": ("libxl", "libxc"), "libxl": ("libxc",)}

D = TypeVar("D", bound=Declaration)


@dataclass
class Layer:
    """One layer of a stream, as its headers announce it.

    ``name`` is ``xl``, ``libxl`` or ``libxc``; ``headers`` are the decoded headers in their order: an
    xl file's `SaveFileHeader` and `SaveFileConfig`, libxl's `LibxlHeader`, libxc's `ImageHeader` and
    `DomainHeader`.
    """

    name: str
    offset: int
    order: ByteOrder
    headers: tuple[Declaration, ...]

    def header(self, kind: type[D]) -> D | None:
        """Return the header of class ``kind``, if this layer has one."""
        return next((h for h in self.headers if isinstance(h, kind)), None)


def read_layer(source: Input, inside: str | None = None) -> Layer:
    """Read the headers of the layer that starts at the input's position, ``inside`` the layer of that name.

    Raises `FormatError` for what is no header, or cannot stand there, and `TruncatedError`.
    """
    name = layer_at(source, inside=inside)
    if inside is not None and name not in INSIDE[inside]:
        raise FormatError(f"{name} cannot stand inside {inside}", offset=source.position, layer=inside)
    return {"xl": _xl, "libxl": _libxl, "libxc": _libxc}[name](source)


def _header(source: Input, kind: type[D], layer: str, order: ByteOrder) -> D:
    offset = source.position
    octets = source.read(kind.head_size)
    if len(octets) < kind.head_size:
        raise TruncatedError(
            f"the input ends inside the {kind.__name__}: expected {kind.head_size} octets, "
            f"found {len(octets)}",
            offset=offset + len(octets),
            layer=layer,
        )
    return kind.parse(octets, order)


def _xl(source: Input) -> Layer:
    offset = source.position
    mark = source.peek(36)[32:]
    orders: tuple[ByteOrder, ...] = ("little", "big")
    matching = [o for o in orders if mark == xl.BYTE_ORDER_MARK.to_bytes(4, o)]
    if len(mark) == 4 and not matching:
        raise FormatError(
            f"expected the byte order mark 01020304 in either order, found {mark.hex()}",
            offset=offset + 32,
            layer="xl",
            field="byteorder",
        )
    order: ByteOrder = matching[0] if matching else "little"
    header = _header(source, xl.SaveFileHeader, "xl", order)
    headers: tuple[Declaration, ...] = (header,)
    if header.optional_data_len:
        headers = (header, _optional_data(source, offset, header, order))
    return Layer("xl", offset, order, headers)


def _optional_data(
    source: Input, offset: int, header: xl.SaveFileHeader, order: ByteOrder
) -> xl.SaveFileConfig:
    length = header.optional_data_len
    if length > MAX_OPTIONAL_DATA:
        raise FormatError(
            f"the header announces {length} octets of optional data; more than {MAX_OPTIONAL_DATA} "
            "is no domain config",
            offset=offset + 44,
            layer="xl",
            field="optional_data_len",
        )
    start = source.position
    octets = source.read(length)
    if len(octets) < length:
        raise TruncatedError(
            f"the input ends inside the optional data: expected {length} octets, found {len(octets)}",
            offset=start + len(octets),
            layer="xl",
        )
    try:
        return xl.SaveFileConfig.parse(octets, order)
    except StreamError as exc:
        raise exc.located(base=start, layer="xl") from None


def _libxl(source: Input) -> Layer:
    offset = source.position
    header = _header(source, libxl.LibxlHeader, "libxl", "big")
    return Layer("libxl", offset, header.order, (header,))


def _libxc(source: Input) -> Layer:
    offset = source.position
    image = _header(source, libxc.ImageHeader, "libxc", "big")
    domain = _header(source, libxc.DomainHeader, "libxc", image.order)
    return Layer("libxc", offset, image.order, (image, domain))
