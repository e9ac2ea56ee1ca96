"""What stands around a stream in an envelope, written: the head with the domain's config, and the tail.

::

    with EnvelopeWriter("libvirt", writer, xml):
        copy_stream(stream, writer)

xend's and xapi's first format hold legacy streams, which nothing here writes, so they are only read.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

from migstream.io.writer import StreamWriter
from migstream.records import envelopes, xl

__all__ = ["EnvelopeWriter", "Kind"]

Kind = Literal["xl", "libvirt", "xapi"]
Content = Literal["libxl", "libxc"]


class EnvelopeWriter:
    """Writes the envelope ``kind`` to ``writer``: its head when it is made, its tail by `finish`.

    ``config`` is the domain's config: for ``xl`` JSON, or xl.cfg text with ``json`` false; for ``libvirt``
    domain XML; both get a NUL at their end if they have none, as xl and libvirt write it; for ``xapi`` the
    S-expression of its ``Xenops`` segment. ``content`` is the layer that stands in the envelope: xl and
    libvirt expect ``libxl``, xapi ``libxc``. ``segments`` are further ones of xapi, such as `QemuTrad`,
    for behind the stream.
    """

    def __init__(
        self,
        kind: Kind,
        writer: StreamWriter,
        config: bytes,
        *,
        json: bool = True,
        content: Content | None = None,
        segments: Sequence[envelopes.XapiSegment] = (),
    ) -> None:
        self._kind = kind
        self._writer = writer
        self._config = config
        self._json = json
        self._content = content or ("libxc" if kind == "xapi" else "libxl")
        self._segments = segments
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()

    def _begin(self) -> None:
        """Write what comes before the stream."""
        writer = self._writer
        order, writer.order = writer.order, "little"  # the stream's own order is its writer's business
        match self._kind:
            case "xl":
                flags = xl.MANDATORY_JSON * self._json
                flags |= xl.MANDATORY_STREAM_V2
                config = xl.SaveFileConfig(config=_ended(self._config))
                length = len(config.build())
                writer.header(xl.SaveFileHeader(mandatory_flags=flags, optional_data_len=length), config)
            case "libvirt":
                xml = _ended(self._config)
                writer.header(envelopes.LibvirtHeader(xml_len=len(xml)), envelopes.LibvirtXml(xml=xml))
            case "xapi":
                writer.header(envelopes.XapiHeader())
                writer.record(envelopes.Xenops(config=self._config))
                writer.record(envelopes.Libxl() if self._content == "libxl" else envelopes.Libxc())
        writer.order = order

    def finish(self) -> None:
        """Write what comes behind the stream."""
        if self._kind == "xapi":
            for segment in self._segments:
                self._writer.record(segment)
            self._writer.record(envelopes.EndOfImage())


def _ended(text: bytes) -> bytes:
    return text if text.endswith(b"\0") else text + b"\0"
