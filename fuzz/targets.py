"""The targets, as one table: each executes octets, and raises for a finding only.

A finding is an exception that is not the package's own, or an `AssertionError` where two parts of the package
disagree. `execute` returns a word on what came of it, for statistics.
"""

from __future__ import annotations

import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice

import zstandard

from fuzz import corpus
from migstream.converting import TARGETS as FORMS
from migstream.converting import Options, convert
from migstream.engines.common import StreamType
from migstream.engines.restore import RestoreCallbacks, restore
from migstream.errors import MigstreamError, StreamError
from migstream.fuzzing.tree import Tree
from migstream.guests.model import ModelGuest
from migstream.guests.registers import processors
from migstream.guests.state_book import StateBook
from migstream.inspection import Report, inspect
from migstream.io import reader
from migstream.io.detect import CODECS
from migstream.io.inputs import MemoryInput
from migstream.io.writer import StreamWriter
from migstream.legacy import convert_legacy
from migstream.records import libxc
from migstream.records.libxc import GuestType
from migstream.verification import RULES, Finding, Severity, Verdict, verify

__all__ = ["TARGETS", "Target"]

GUEST_PAGES = 1024
DECODED = 1 << 20  # octets of a body that the reader's target decodes
UNPACKED = 4 << 20  # octets that are read of a compressed stream: a few octets may unpack to gigabytes

#: Pages in verify mode, or a legacy stream without any, leave nothing to convert.
MAY_LACK = frozenset({"layout-missing"})
#: What restore takes of an image all the same: what it lacks, as Xen's does, and what it directly stands in.
TAKEN = MAY_LACK | {"xl-without-libxl", "libvirt-without-libxl"}


@dataclass(frozen=True)
class Target:
    """One thing to fuzz. ``corpus`` gives the streams that its mutations begin with."""

    name: str
    execute: Callable[[bytes], str]
    corpus: Callable[[], Sequence[bytes]]


def _read(octets: bytes) -> str:
    """Walk a stream and decode every record."""
    stream = reader.open_memory(octets)
    malformed = False
    try:
        for frame in stream:
            if frame.length <= DECODED:
                try:
                    frame.record()
                except StreamError:
                    malformed = True
    except StreamError:
        return "damaged"
    assert stream.position <= len(octets), "read past the end"
    return "malformed" if malformed else "read"


def _tree(octets: bytes) -> str:
    """Take a stream apart and build it back."""
    tree = Tree.parse(octets)
    assert tree.build() == octets, "a tree builds to other octets than it was parsed from"
    return "damaged" if tree.labels()[-1:] == ["raw unframed"] else "framed"


def _verify(octets: bytes) -> str:
    """Inspect and verify: they agree on whether a stream can be read to its end."""
    report = Report()
    for line in inspect(reader.open_memory(octets), report, count_zero=True):
        line.to_json()
        assert line.text is not None
    report.to_json()
    verdict = verify(reader.open_memory(octets))
    for finding in verdict.findings:
        finding.to_json()
        assert 0 <= finding.offset <= len(octets), f"outside the stream: {finding}"
    sound = verdict.sound()
    readable = report.error is None or "stream-ends-in-checkpoint" in verdict.counts
    assert readable or not sound, f"sound, but cannot be read: {report.error}"
    return "sound" if sound else "unsound"


_CALLBACKS = RestoreCallbacks(
    checkpoint=lambda: 1,
    postcopy=lambda: 1,
    wait_checkpoint=lambda: 1,
    suspend=lambda: 1,
    restore_results=lambda store, console: None,
)


def _restore(octets: bytes) -> str:
    """Restore into a model of 4 MiB, as every type of stream in turn; what restore takes, verify does."""
    choice = zlib.crc32(octets)
    kind = list(StreamType)[choice % 3]
    guest = GuestType.PV if _names_pv(octets) else GuestType.HVM
    target = ModelGuest.empty(GUEST_PAGES, guest)
    with open(os.devnull, "wb") as back_channel:
        try:
            restore(
                target,
                reader.open_memory(octets),
                stream_type=kind,
                callbacks=None if kind is StreamType.PLAIN else _CALLBACKS,
                send_back_fd=back_channel.fileno(),
                reset_rings=bool(choice & 0x100),
                verify_fails=bool(choice & 0x200),
                spill_limit=16 << 20,
            )
        except MigstreamError:
            return "refused"
    verdict = verify(reader.open_memory(octets))
    # Around the image restore takes more than verify does, as it is not libxl.
    broken = {
        finding.rule.id
        for finding in verdict.findings
        if finding.severity is Severity.ERROR and finding.layer == "libxc" and not _is_origin(finding)
    } - TAKEN
    assert kind is not StreamType.PLAIN or not broken, f"restored, though {' '.join(sorted(broken))}"
    return "restored"


def _is_origin(finding: Finding) -> bool:
    """Whether it is about a record that a model has no use for, so that restore leaves it alone."""
    return finding.record is not None and finding.record.type == libxc.Origin.type


def _names_pv(octets: bytes) -> bool:
    """Whether the first image's domain header says PV, so that restores go further than the headers."""
    stream = reader.open_memory(octets)
    with suppress(StreamError):
        for item in islice(stream.items(), 8):
            if isinstance(item, reader.Layer) and (head := item.header(libxc.DomainHeader)) is not None:
                return head.type == GuestType.PV
    return False


def _errors(verdict: Verdict) -> set[str]:
    return {rule for rule in verdict.counts if RULES[rule].severity is Severity.ERROR}


@contextmanager
def _file(octets: bytes = b"") -> Iterator[int]:
    fd = os.memfd_create("fuzz")
    try:
        if octets:
            os.write(fd, octets)
            os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _legacy(octets: bytes) -> str:
    """Convert a legacy stream: what comes out is sound."""
    with _file() as fd:
        try:
            convert_legacy(MemoryInput(octets), StreamWriter(fd), libxl=bool(zlib.crc32(octets) & 1))
        except MigstreamError:
            return "refused"
        broken = _errors(verify(reader.open_memory(_content(fd)))) - MAY_LACK
    assert not broken, f"a legacy stream became one that breaks {' '.join(sorted(broken))}"
    return "converted"


_MAGICS = tuple(CODECS)
_PACKERS: tuple[Callable[[bytes], bytes], ...] = (
    zstandard.ZstdCompressor(level=1).compress,
    lambda octets: zlib.compress(octets, 1, 31),
    lambda octets: lzma.compress(octets, preset=0),
)


def _packed(octets: bytes) -> str:
    """Read a file that is compressed: as it is, or compressed here, and then perhaps cut or changed."""
    choice = zlib.crc32(octets)
    if not octets.startswith(_MAGICS):
        octets = _PACKERS[choice % 3](octets)
        at = (choice >> 8) % len(octets)
        damage = (
            octets,
            octets[:at],
            octets[:at] + bytes([choice >> 24]) + octets[at + 1 :],
            octets + octets,
        )
        octets = damage[choice >> 2 & 3]
    with _file(octets) as fd, reader.open(fd) as stream:
        try:
            for frame in stream:
                if stream.position > UNPACKED:
                    return "long"
                frame.skip(min(frame.left or 0, UNPACKED))
                if frame.left:
                    return "long"
        except StreamError:
            return "damaged"
    return "read"


def _hvm_context(octets: bytes) -> str:
    """Decode the registers in HVM contexts and PV processors' states."""
    book = StateBook()
    try:
        for frame in reader.open_memory(octets):
            if frame.layer.name == "libxc" and not frame.is_page_data:
                with suppress(StreamError):
                    record = frame.record()
                    if frame.record_class is not None:
                        book.apply(record)
    except StreamError:
        pass
    found = processors(book)
    for registers in found:
        assert all(0 <= value < 1 << 64 for value in registers.values())
    return f"{min(len(found), 9)} processors"


def _convert(octets: bytes) -> str:
    """Convert to each form in turn: what was sound stays so."""
    choice = zlib.crc32(octets)
    form = list(FORMS.values())[choice % len(FORMS)]
    options = Options(lossy=bool(choice & 0x100), flatten=bool(choice & 0x200))
    with _file(octets) as source, _file() as target:
        try:
            with reader.open(source) as stream:
                convert(stream, target, form, options)
        except MigstreamError:
            return "refused"
        if not form.layers:
            return "described"
        made = _content(target)
    broken = _errors(verify(reader.open_memory(made))) - MAY_LACK
    if broken and verify(reader.open_memory(octets)).sound():
        raise AssertionError(f"converted to {form.name}, a sound stream breaks {' '.join(sorted(broken))}")
    return "converted"


#: Every target by its name.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("reader", _read, corpus.streams),
        Target("tree", _tree, corpus.streams),
        Target("verify", _verify, corpus.streams),
        Target("restore", _restore, corpus.streams),
        Target("legacy", _legacy, corpus.legacy),
        Target("packed", _packed, corpus.vectors),
        Target("hvm-context", _hvm_context, corpus.contexts),
        Target("convert", _convert, corpus.streams),
    )
}
