"""What is checked of the envelopes of other toolstacks: libvirt's and xend's headers, xapi's segments."""

from __future__ import annotations

from collections.abc import Iterator

from migstream.errors import FormatError
from migstream.io.reader import Frame, Layer, Segment
from migstream.records import Declaration, envelopes, record_class, xl
from migstream.sexpr import parse

__all__ = ["check_content", "check_envelope", "check_segment"]

LOOKED_INTO = 8 << 20  # octets of an S-expression that are parsed


def check_envelope(header: Declaration) -> Iterator[tuple[str, str, int]]:
    """Yield (rule, message, offset within the layer) for what is wrong with a header of an envelope."""
    match header:
        case envelopes.LibvirtHeader():
            if header.version not in (1, envelopes.LIBVIRT_V2):
                yield "libvirt-version", f"version {header.version}", 16
            if not header.xml_len:
                yield "libvirt-xml-absent", "no XML", 20
        case envelopes.LibvirtXml():
            if header.xml and not (b"<domain" in header.xml and header.xml.endswith(b"\0")):
                found = f"{len(header.xml)} octets, starting with {header.xml[:16].hex(' ')}"
                yield "libvirt-xml-malformed", found, envelopes.LibvirtHeader.head_size
        case envelopes.XendConfig():
            at = envelopes.XendHeader.head_size
            try:
                if not isinstance(parse(header.config), list):
                    yield "xend-config-malformed", "an atom, no list", at
            except FormatError as exc:
                yield "xend-config-malformed", exc.message, at + (exc.offset or 0)


def check_content(layer: Layer, around: Layer) -> Iterator[tuple[str, str]]:
    """Yield (rule, message) for what is wrong with ``layer`` directly inside the envelope ``around``."""
    if around.name == "libvirt" and layer.name != "libxl":
        yield "libvirt-without-libxl", "no libxl header between libvirt's and this one"
    match around.headers[0]:
        case xl.SaveFileHeader(mandatory_flags=flags) if not flags & xl.MANDATORY_STREAM_V2:
            yield "xl-not-stream-v2", f"mandatory flags {flags:#x}"
        case envelopes.LibvirtHeader(version=1):
            yield "libvirt-not-stream-v2", "version 1"


def check_segment(segment: Segment) -> Iterator[tuple[str, str, int]]:
    """Yield (rule, message, offset in the stream) for what is wrong with a segment of xapi's image."""
    kind = record_class("xapi", segment.code)
    at = segment.offset
    if kind is None:
        yield "xapi-segment-unknown", f"type {segment.code:#x}, {segment.announced} octets", at
        return
    if kind in (envelopes.Libxl, envelopes.QemuXen):
        yield "xapi-segment-unread", kind.type, at
    if segment.announced != segment.length:
        yield "xapi-segment-length", f"{kind.type} of {segment.announced} octets", at + 8
    if kind is envelopes.Xenops:
        yield from _xenops(segment)


def _xenops(frame: Frame) -> Iterator[tuple[str, str, int]]:
    if frame.length > LOOKED_INTO:
        yield "body-unusual", f"{frame.length} octets", frame.offset
        return
    record = frame.record()
    assert isinstance(record, envelopes.Xenops)
    try:
        found = parse(record.config, "ocaml")
    except FormatError as exc:
        yield "xapi-xenops-malformed", exc.message, frame.body_offset + (exc.offset or 0)
        return
    fields = {item[0] for item in found if isinstance(item, list) and item and isinstance(item[0], str)}
    missing = {"time", "word_size"} - fields
    if missing:
        yield "xapi-xenops-malformed", f"without {' and '.join(sorted(missing))}", frame.body_offset
