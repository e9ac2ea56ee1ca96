"""What a file is, from its first octets: which layer starts here, or what else it is.

`open_input` makes the input for a path or descriptor and unpacks compressed ones; `layer_at` names
the layer that starts at a place, or raises an error that names what stands there instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from typing import BinaryIO, Protocol, cast

from migstream.errors import FormatError, TruncatedError
from migstream.io import fd as fdio
from migstream.io.inputs import CodecInput, CodecReader, DescriptorInput, FileInput, Input
from migstream.records import envelopes, libxc, libxl, xl
from migstream.records.legacy import is_legacy

__all__ = ["CODECS", "layer_at", "open_input"]

MAX_WINDOW = 128 << 20  # octets of history that compressed data may ask for: zstd's own --long default
UNPACK_CHUNK = 128 << 10  # octets of compressed data taken at a time
LIBXC_MAGIC = libxc.MARKER.to_bytes(8, "big") + libxc.IMAGE_ID.to_bytes(4, "big")
LIBXL_MAGIC = libxl.IDENT.to_bytes(8, "big")

#: Layers by their magic. The libxc image header and the libxl header are big-endian in every stream.
_LAYERS = {
    "xl": xl.MAGIC,
    "libvirt": envelopes.LIBVIRT_MAGIC,
    "xend": envelopes.XEND_MAGIC,
    "xapi": envelopes.XAPI_MAGIC,
    "xapi1": envelopes.XAPI1_MAGIC,
    "libxl": LIBXL_MAGIC,
    "libxc": LIBXC_MAGIC,
}
_EXPECTED = "the header of an xl, libvirt, xend or xapi save, of libxl or of libxc"

#: Other things people point at a stream reader: magic -> what to call it. Sources: facts of each
#: project's own headers, and the magic numbers that file(1) knows.
_FOREIGN: dict[bytes, str] = {
    b"QemuDeviceModelRecord": "the QEMU tail of a legacy HVM save",
    b"DeviceModelRecord0002": "the QEMU tail of a legacy HVM save",
    b"LibvirtQemudSave": "a save image of libvirt's QEMU driver",
    b"LibvirtQemudPart": "an unfinished save image of libvirt's QEMU driver",
    b"QEVM": "a QEMU migration stream",
    b"EMiL": "a LiME memory image",
    b"KDUMP   ": "a kdump memory image",
    b"\x7fELF": "an ELF file (a core dump?)",
    b"\x19\x43\x56\x54": "a CRIU image",
    b"\x40\x59\x10\x55": "a CRIU image",
    b"\xd0\xbe\xd2\xbe": "a VMware saved state",
    b"\xd1\xba\xd1\xba": "a VMware saved state",
    b"\xd2\xbe\xd2\xbe": "a VMware saved state",
    b"\xd3\xbe\xd3\xbe": "a VMware saved state",
    b"PK\x03\x04": "a zip archive",
}


def _zstd(raw: Input) -> CodecReader:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    packed = cast(BinaryIO, _Arriving(raw))
    return decompressor.stream_reader(packed, read_across_frames=True, closefd=False)


class _Arriving:
    """All that zstandard needs of a file. It gives what is there, so that a live sender is not waited for."""

    def __init__(self, raw: Input) -> None:
        self._raw = raw

    def read(self, length: int) -> bytes:
        return self._raw.read_some(length)


def _gzip(raw: Input) -> CodecReader:
    return _Unpacker(raw, _GzipDecoder)


def _xz(raw: Input) -> CodecReader:
    import lzma

    # Bounded, as an xz header may ask for a dictionary of 4 GiB.
    bounded = partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, memlimit=MAX_WINDOW)
    return _Unpacker(raw, bounded)


class _Decoder(Protocol):
    """Unpacks one stream; as the standard library's decompressors of lzma and bz2."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipDecoder:
    """Makes a `_Decoder` of zlib's."""

    def __init__(self) -> None:
        import zlib

        self._zlib = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: gzip, not zlib

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


class _Unpacker:
    """Reads streams one after the other; what is there of a truncated one comes out, then the end.

    The standard library's GzipFile and LZMAFile drop what they unpacked when the input ends early.
    """

    def __init__(self, raw: Input, make_decoder: Callable[[], _Decoder]) -> None:
        self._raw = raw
        self._make_decoder = make_decoder
        self._start_stream()

    def _start_stream(self) -> None:
        self._decoder = self._make_decoder()
        self._begun = False

    def close(self) -> None:
        """Close nothing: the input belongs to who made it."""

    def readinto(self, view: memoryview) -> int:
        unpacked = b""
        while view and not unpacked:
            packed = b""
            if self._decoder.eof:
                packed = self._decoder.unused_data
                self._start_stream()
            if not packed and self._decoder.needs_input:
                packed = self._raw.read_some(UNPACK_CHUNK)
                if not packed:
                    return 0
            if not self._begun:
                packed = packed.lstrip(b"\0")  # padding between streams
                self._begun = bool(packed)
            if self._begun:
                unpacked = self._decoder.decompress(packed, len(view))
        view[: len(unpacked)] = unpacked
        return len(unpacked)


#: First octets of a compressed file -> its name, and what unpacks it.
CODECS: dict[bytes, tuple[str, Callable[[Input], CodecReader]]] = {
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
    b"\x1f\x8b\x08": ("gzip", _gzip),
    b"\xfd7zXZ\0": ("xz", _xz),
}


def open_input(source: str | os.PathLike[str] | int, timeout_s: float | None = None) -> Input:
    """Make the input for a path, or for a descriptor, which stays the caller's.

    Raises `OSError` for what cannot be opened or read, such as a directory.
    """
    owned = not isinstance(source, int)
    fd = source if isinstance(source, int) else os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.pread(fd, 0, 0) if fdio.file_size(fd) is not None else os.read(fd, 0)
        inner = (
            DescriptorInput(fd, owned=owned, timeout_s=timeout_s)
            if fdio.file_size(fd) is None
            else FileInput(fd, owned=owned)
        )
        return _unpacked(inner)
    except BaseException:
        if owned:
            os.close(fd)
        raise


def _unpacked(inner: Input) -> Input:
    start = inner.peek(6)
    for magic, (name, make) in CODECS.items():
        if start.startswith(magic):
            return CodecInput(inner, make(inner), name)
    return inner


def layer_at(source: Input, *, inside: str | None = None) -> str:
    """Return which layer's header starts at the input's position: ``xl``, ``libvirt``, ``libxl``, ...

    ``inside`` is the layer that announced it, for the error. Raises `TruncatedError` at the end of the
    input and `FormatError`, naming what was found, for anything else.
    """
    offset = source.position
    start = source.peek(8)
    candidates = [name for name, magic in _LAYERS.items() if magic.startswith(start)]
    if start and candidates:
        start = source.peek(len(_LAYERS[candidates[0]]))
        for name in candidates:
            if start.startswith(_LAYERS[name]):
                return name
    expected = _EXPECTED if inside is None else f"a header inside {inside}"
    if not start:
        what = "the input is empty" if offset == 0 else "the input ends"
        raise TruncatedError(f"{what}: expected {expected}", offset=offset, layer=inside)
    for name in candidates:
        if _LAYERS[name].startswith(start):
            raise TruncatedError(
                f"the input ends inside {name}'s magic, after {len(start)} octets of it",
                offset=offset + len(start),
                layer=name,
            )
    start = source.peek(64)
    raise FormatError(
        f"expected {expected}, found {describe(start)}",
        offset=offset,
        layer=inside,
        hint="'migstream convert' turns it into the present format" if is_legacy(start) else None,
    )


def describe(start: bytes) -> str:
    """Name what ``start``, the first octets of something, belongs to."""
    for magic, name in _FOREIGN.items():
        if start.startswith(magic):
            return name
    if start.startswith(b"\xff" * 8):
        return f"a libxc marker whose id is {start[8:12].hex() or 'cut off'} instead of 58454e46 (XENF)"
    legacy = is_legacy(start)
    if legacy:
        return f"what looks like {legacy}, as Xen 4.5 and earlier wrote it"
    if re.fullmatch(rb"[\t\n\r\x20-\x7e]+", start):
        return f"text: {start[:24].decode('ascii')!r}"
    return f"unknown octets {start[:16].hex(' ')}"
