"""The layers around the records of an output: which headers to write when, and what ends them.

The input's layers are taken as they are met. Those that the target shares are written again as they are,
those that it lacks are left out, and those that only the target has are made up when something is about to
stand inside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TypeVar

from migstream.converting.options import ConvertError, Options, Target
from migstream.io.envelopes import EnvelopeWriter
from migstream.io.reader import Layer
from migstream.io.writer import StreamWriter
from migstream.layout import Layout
from migstream.records import ByteOrder, Declaration, PageData, Record, envelopes, libxc, libxl, xl
from migstream.records.libxc import GuestType

__all__ = ["Envelope", "check_xl_config", "holding_libxl"]

D = TypeVar("D", bound=Declaration)

#: Envelopes that hold the domain's config, and the form that they hold it in.
CONFIGS = {"xl": "JSON, as xl writes it", "libvirt": "domain XML"}


class Envelope:
    """Writes headers, the marks between layers, and the static data that the input's version lacks.

    ``made_libxl`` says that the target has a libxl stream where the input has none. ``changed`` says that
    the output's layers are not the input's.
    """

    def __init__(self, writer: StreamWriter, target: Target, options: Options) -> None:
        self._writer = writer
        self._target = target
        self._options = options
        self._outer: Layer | None = None
        self._opened: set[str] = set()
        self._layout: Layout | None = None
        self.made_libxl = False
        self.source_layers: list[str] = []
        self.version_in = 3
        self.version_out = 3

    @property
    def changed(self) -> bool:
        """Whether layers were added, left out or given other content."""
        return tuple(self.source_layers) != self._target.layers or self._options.config is not None

    def layer(self, layer: Layer) -> None:
        """Write what the header of a layer of the input becomes."""
        self.source_layers.append(layer.name)
        if layer.name == "libxl":
            self._open_outer()
            if "libxl" in self._target.layers:
                self._header(layer.order, *layer.headers)
                self._opened.add("libxl")
        elif layer.name == "libxc":
            self._open_outer()
            if "libxl" in self._target.layers and "libxl" not in self._opened:
                self._make_libxl(layer.order)
            self._image(layer)
        else:
            self._outer = layer

    def left_out(self) -> Iterator[str]:
        """Yield a line on what of the input's envelope the output does not have."""
        if self._outer is not None and self._outer.name not in self._opened:
            name = self._outer.name
            yield f"left out: the {name} envelope with the domain's config (inspect --config shows it)"

    def record(self, code: type[Record], *, within: str = "libxc") -> None:
        """Write a record without a body."""
        if within in self._target.layers:
            self._writer.record(code())

    # Headers

    def _header(self, order: ByteOrder, *headers: Declaration) -> None:
        self._writer.order = order
        self._writer.header(*headers)

    def _open_outer(self) -> None:
        kind = self._target.layers[0]
        if kind not in CONFIGS or kind in self._opened:
            return
        self._opened.add(kind)
        own = self._outer
        config = self._options.config
        if own is not None and own.name == kind and config is None:
            self._header(own.order, *(holding_libxl(header) for header in own.headers))
            return
        if config is None:
            raise ConvertError(
                f"{kind} needs the domain's config, which the input does not have; "
                f"give it with --config FILE ({CONFIGS[kind]})"
            )
        if kind == "xl":
            check_xl_config(config)
        EnvelopeWriter("xl" if kind == "xl" else "libvirt", self._writer, config)

    def _make_libxl(self, order: ByteOrder) -> None:
        self.made_libxl = True
        self._opened.add("libxl")
        self._header(order, libxl.LibxlHeader(options=libxl.BIG_ENDIAN if order == "big" else 0))
        self._writer.record(libxl.LibxcContext())

    def _image(self, layer: Layer) -> None:
        image, domain = layer.headers
        assert isinstance(image, libxc.ImageHeader)
        assert isinstance(domain, libxc.DomainHeader)
        self.version_in = image.version
        self.version_out = self._target.version or (3 if self._options.policies else image.version)
        if domain.type not in list(GuestType):
            if self.version_in != self.version_out:
                raise ConvertError(f"the guest type {domain.type} is not known: its version cannot change")
        else:
            self._layout = Layout(GuestType(domain.type), image.version)
        self._header(layer.order, _replaced(image, version=self.version_out), domain)

    # Static data

    def before(self, record: type[Record] | None) -> bool:
        """Write what has to stand before a libxc record of this type; return whether the record stays.

        A version 2 image has its static data's end inferred, a version 3 image has a record for it.
        """
        layout = self._layout
        if layout is None or record is None:
            return True
        if record in _POLICIES and self.version_out < 3:
            return False
        given = dict(zip(_POLICIES, (self._options.cpuid, self._options.msr), strict=True))
        if record in _POLICIES and given[record] is not None:
            raise ConvertError(f"the input has {record.type} already, so none can be given")
        ends = layout.infers_static_data_end(record) or (
            record is libxc.StaticDataEnd and not layout.static_data_ended
        )
        if not layout.static_data_ended and record in (libxc.End, libxc.Checkpoint):
            ends = self.version_in < 3  # an image without pages
        if ends and self.version_out >= 3:
            for policy in self._options.policies:
                self._writer.record(policy)
            if record is not libxc.StaticDataEnd:
                self._writer.record(libxc.StaticDataEnd())
        if ends:
            layout.seen.add(libxc.StaticDataEnd)
        if record in (PageData, libxc.X86PvP2mFrames, libxc.StaticDataEnd):
            layout.note(record)
        return not (record is libxc.StaticDataEnd and self.version_out < 3)


_POLICIES: tuple[type[Record], ...] = (libxc.X86CpuidPolicy, libxc.X86MsrPolicy)


def check_xl_config(config: bytes) -> None:
    """Raise `ConvertError` for what xl would not take for the config of a domain: a JSON object."""
    try:
        parsed = json.loads(config.rstrip(b"\0"))
    except (ValueError, RecursionError) as exc:
        raise ConvertError(f"the config is not JSON: {exc}") from None
    if not isinstance(parsed, dict):
        raise ConvertError("the config is JSON, but not an object")


def _replaced(header: D, **changes: int) -> D:
    """Return ``header`` with other values in some fields."""
    values = {wire.name: getattr(header, wire.name) for wire in header.wire_fields}
    return type(header)(**(values | changes))


def holding_libxl(header: Declaration) -> Declaration:
    """Return an envelope's header as it is where a libxl v2 stream follows, not a legacy one."""
    match header:
        case xl.SaveFileHeader():
            return _replaced(header, mandatory_flags=header.mandatory_flags | xl.MANDATORY_STREAM_V2)
        case envelopes.LibvirtHeader():
            return _replaced(header, version=envelopes.LIBVIRT_V2)
    return header
