"""Layers: the headers that say what follows them, read from an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from migstream.errors import FormatError, StreamError, TruncatedError
from migstream.io.detect import layer_at
from migstream.io.inputs import Input
from migstream.records import ByteOrder, Declaration, envelopes, libxc, libxl, xl
from migstream.text import decode

__all__ = ["Layer", "read_layer"]

MAX_CONFIG = 1 << 20  # octets of config that an envelope may carry; real ones have a few KiB
SHORTEST_XML = 16  # octets; no domain's XML is shorter, and no version of libvirt's image as high

#: What may stand directly inside a layer; a legacy stream, which is no layer, in any but libxl.
INSIDE: dict[str, tuple[str, ...]] = {
    "xl": ("libxl", "libxc"),
    "libvirt": ("libxl", "libxc"),
    "xend": (),
    "xapi1": (),
    "xapi": ("libxl", "libxc"),
    "libxl": ("libxc",),
}

D = TypeVar("D", bound=Declaration)


@dataclass
class Layer:
    """One layer of a stream, as its headers announce it.

    ``headers`` are the decoded headers in their order, by ``name``: ``xl``: `SaveFileHeader` and
    `SaveFileConfig`; ``libvirt``: `LibvirtHeader` and `LibvirtXml`; ``xend``: `XendHeader` and
    `XendConfig`; ``xapi1``: `Xapi1Header`; ``xapi``: `XapiHeader` (its config is the body of the segment
    `Xenops`); ``libxl``: `LibxlHeader`; ``libxc``: `ImageHeader` and `DomainHeader`.
    """

    name: str
    offset: int
    order: ByteOrder
    headers: tuple[Declaration, ...]

    def header(self, kind: type[D]) -> D | None:
        """Return the header of class ``kind``, if this layer has one."""
        return next((h for h in self.headers if isinstance(h, kind)), None)

    @property
    def config(self) -> bytes | None:
        """The domain's config as it stands in an envelope, with a NUL at its end if it has one.

        ``xl``: JSON or xl.cfg text; ``libvirt``: XML; ``xend``: an S-expression; ``None`` in other layers.
        """
        match self.headers:
            case [_, xl.SaveFileConfig() as found]:
                return found.config
            case [_, envelopes.LibvirtXml() as found]:
                return found.xml
            case [_, envelopes.XendConfig() as found]:
                return found.config
        return None

    @property
    def config_text(self) -> str | None:
        """The config without the NUL at its end; octets that are not UTF-8 become surrogates."""
        return None if self.config is None else decode(self.config.rstrip(b"\0"))


def read_layer(source: Input, inside: str | None = None) -> Layer:
    """Read the headers of the layer that starts at the input's position, ``inside`` the layer of that name.

    Raises `FormatError` for what is no header, or cannot stand there, and `TruncatedError`. Of what is no
    header nothing is consumed.
    """
    name = layer_at(source, inside=inside)
    if inside is not None and name not in INSIDE[inside]:
        raise FormatError(f"{name} cannot stand inside {inside}", offset=source.position, layer=inside)
    return _READERS[name](source)


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
    start = source.position
    octets = _config(
        source, header.optional_data_len, "xl", offset + 44, "optional_data_len", "optional data"
    )
    try:
        return xl.SaveFileConfig.parse(octets, order)
    except StreamError as exc:
        raise exc.located(base=start, layer="xl") from None


def _config(
    source: Input, length: int, layer: str, announced_at: int, field: str, what: str = "config"
) -> bytes:
    """Read the ``length`` octets of config that ``field``, at the offset ``announced_at``, announces."""
    if length > MAX_CONFIG:
        raise FormatError(
            f"the header announces {length} octets of {what}; more than {MAX_CONFIG} is no domain config",
            offset=announced_at,
            layer=layer,
            field=field,
        )
    start = source.position
    octets = source.read(length)
    if len(octets) < length:
        raise TruncatedError(
            f"the input ends inside the {what}: expected {length} octets, found {len(octets)}",
            offset=start + len(octets),
            layer=layer,
        )
    return octets


def _libvirt(source: Input) -> Layer:
    offset = source.position
    header = _header(source, envelopes.LibvirtHeader, "libvirt", "little")
    # libvirt's cloud-hypervisor driver uses the same magic; its header has no version: the XML's length
    # comes first, then zeros.
    if header.xml_len == 0 and header.version >= SHORTEST_XML:
        raise FormatError(
            "expected a save image of libvirt's libxl driver, found one of its cloud-hypervisor driver, "
            f"with {header.version} octets of XML",
            offset=offset,
            layer="libvirt",
        )
    xml = _config(source, header.xml_len, "libvirt", offset + 20, "xml_len")
    return Layer("libvirt", offset, "little", (header, envelopes.LibvirtXml(xml=xml)))


def _xend(source: Input) -> Layer:
    offset = source.position
    header = _header(source, envelopes.XendHeader, "xend", "big")
    config = _config(source, header.config_len, "xend", offset + 16, "config_len")
    return Layer("xend", offset, "big", (header, envelopes.XendConfig(config=config)))


def _xapi1(source: Input) -> Layer:
    offset = source.position
    return Layer("xapi1", offset, "little", (_header(source, envelopes.Xapi1Header, "xapi1", "little"),))


def _xapi(source: Input) -> Layer:
    offset = source.position
    return Layer("xapi", offset, "little", (_header(source, envelopes.XapiHeader, "xapi", "little"),))


def _libxl(source: Input) -> Layer:
    offset = source.position
    header = _header(source, libxl.LibxlHeader, "libxl", "big")
    return Layer("libxl", offset, header.order, (header,))


def _libxc(source: Input) -> Layer:
    offset = source.position
    image = _header(source, libxc.ImageHeader, "libxc", "big")
    domain = _header(source, libxc.DomainHeader, "libxc", image.order)
    return Layer("libxc", offset, image.order, (image, domain))


_READERS: dict[str, Callable[[Input], Layer]] = {
    "xl": _xl,
    "libvirt": _libvirt,
    "xend": _xend,
    "xapi1": _xapi1,
    "xapi": _xapi,
    "libxl": _libxl,
    "libxc": _libxc,
}
