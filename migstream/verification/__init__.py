"""Is a stream sound? Every rule that the specification implies, each with its place.

`verify` walks a stream once, whatever its size, seeking over pages, and never stops at what it can
still frame. The rules are in `rules`; what is checked of single records in `fields` and `pages`; the
order of records comes from `migstream.layout`, which the restore engine uses too.
"""

from __future__ import annotations

from typing import Protocol

from migstream.errors import FormatError, StreamError, TruncatedError
from migstream.io.reader import Frame, Layer, Segment, Stream, Trailer
from migstream.layout import Kind, Layout
from migstream.records import MAX_RECORD_LENGTH, envelopes, libxc, libxl, xl
from migstream.records.libxc import GuestType
from migstream.verification.fields import check_fields
from migstream.verification.findings import Finding, Verdict
from migstream.verification.pages import PageContext, check_page_data
from migstream.verification.rules import RULES, Rule, Severity
from migstream.verification.toolstacks import check_content, check_envelope, check_segment

__all__ = ["RULES", "Finding", "Rule", "Severity", "Verdict", "verify"]

LOOKED_INTO = 8 << 20  # octets of a body that are decoded; the state of any known guest is smaller
XL_CLOSING_MESSAGE = b"domain is yours, you are cleared to unpause\0"
PAGE_SHIFT = 12

#: Rules for a misplaced record, by what is wrong: (Xen refuses it, Xen takes it).
_LAYOUT_RULES = {
    Kind.FOREIGN: ("layout-foreign", "layout-foreign"),
    Kind.BACK_CHANNEL: ("layout-back-channel", "layout-back-channel"),
    Kind.DEPRECATED: ("layout-deprecated", "layout-deprecated"),
    Kind.PLAIN: ("layout-foreign", "layout-foreign"),
    Kind.REPEATED: ("layout-repeated", "layout-repeated-tolerated"),
    Kind.TOO_EARLY: ("layout-order", "layout-order-tolerated"),
    Kind.TOO_LATE: ("layout-static-late", "layout-static-late"),
    Kind.MISSING: ("layout-missing", "layout-missing-usual"),
}
_STATIC_POLICIES = {libxc.X86CpuidPolicy: "CPUID", libxc.X86MsrPolicy: "MSR"}


def verify(stream: Stream) -> Verdict:
    """Read ``stream`` to its end and return the findings in the order of their places.

    Damage to the stream becomes a finding; only errors of the input itself (`OSError`,
    `DeadlineError`) are raised.
    """
    verifier = _Verifier(stream)
    try:
        for item in stream.items():
            match item:
                case Layer():
                    verifier.layer(item)
                case Frame():
                    verifier.frame(item)
                case Trailer():
                    verifier.trailer(item)
    except StreamError as exc:
        verifier.damage(exc)
    else:
        verifier.end()
    return verifier.verdict


class _Complain(Protocol):
    """Adds a finding about a header; ``offset`` is within the layer."""

    def __call__(self, rule: str, message: str, offset: int = 0) -> None: ...


class _Verifier:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.verdict = Verdict()
        self.layout: Layout | None = None
        self.pages = PageContext(hvm=True)
        self.guest_width: int | None = None
        self.image_ended = False
        self.checkpoint_open = False
        self._previous: Frame | None = None

    # Layers and their headers

    def layer(self, layer: Layer) -> None:
        def complain(rule: str, message: str, offset: int = 0) -> None:
            self.verdict.add(rule, message, offset=layer.offset + offset, layer=layer.name)

        for header in layer.headers:
            for wire, value in header.reserved_fields():
                complain("reserved-field", f"{type(header).__name__}.{wire.name} is {value!r}, not zero")
            match header:
                case xl.SaveFileHeader():
                    self._xl_header(header, complain)
                case xl.SaveFileConfig():
                    self._xl_config(header, complain)
                case libxl.LibxlHeader():
                    self._libxl_header(header, complain)
                case libxc.ImageHeader():
                    self._image_header(header, complain)
                case libxc.DomainHeader():
                    self._domain_header(header, complain)
                case _:
                    for rule, message, offset in check_envelope(header):
                        complain(rule, message, offset)
        if len(self.stream.layers) == 2:
            for rule, message in check_content(layer, self.stream.layers[0]):
                complain(rule, message)
        if layer.name == "libxc":
            self._image(layer, complain)

    def _xl_header(self, header: xl.SaveFileHeader, complain: _Complain) -> None:
        known = xl.MANDATORY_JSON | xl.MANDATORY_STREAM_V2
        if header.mandatory_flags & ~known:
            complain("xl-mandatory-flags", f"mandatory flags {header.mandatory_flags:#x}", 36)
        if header.optional_flags:
            complain("xl-optional-flags", f"optional flags {header.optional_flags:#x}", 40)
        if not header.optional_data_len:
            complain("xl-config-absent", "no optional data", 44)

    def _xl_config(self, config: xl.SaveFileConfig, complain: _Complain) -> None:
        header = self.stream.layers[0].header(xl.SaveFileHeader)
        at = xl.SaveFileHeader.head_size
        if config.surplus:
            complain("xl-config-surplus", f"{len(config.surplus)} octets", at + 4 + config.config_len)
        if not config.config:
            complain("xl-config-absent", "the config is empty", at)
        elif header is not None and header.mandatory_flags & xl.MANDATORY_JSON:
            import json

            try:
                if not isinstance(json.loads(config.text), dict):
                    complain("xl-config-malformed", "JSON, but no object", at + 4)
            except (ValueError, RecursionError) as exc:
                complain("xl-config-malformed", f"no JSON: {exc}", at + 4)

    def _libxl_header(self, header: libxl.LibxlHeader, complain: _Complain) -> None:
        if header.version != 2:
            complain("libxl-version", f"version {header.version}", 8)
        if header.options & libxl.BIG_ENDIAN:
            complain("libxl-big-endian", f"options {header.options:#x}", 12)
        if header.options & libxl.OPTIONS_RESERVED:
            complain("libxl-options-reserved", f"options {header.options:#x}", 12)
        if header.options & libxl.LEGACY:
            complain("libxl-converted", f"options {header.options:#x}", 12)

    def _image_header(self, header: libxc.ImageHeader, complain: _Complain) -> None:
        if header.version not in (2, 3):
            complain("image-version", f"version {header.version}", 12)
        if header.options & libxc.BIG_ENDIAN:
            complain("image-big-endian", f"options {header.options:#x}", 16)
        if header.options & libxc.OPTIONS_RESERVED:
            complain("image-options-reserved", f"options {header.options:#x}", 16)

    def _domain_header(self, header: libxc.DomainHeader, complain: _Complain) -> None:
        if header.type not in set(GuestType):
            complain("domain-type", f"type {header.type:#x}", 24)
        if header.page_shift != PAGE_SHIFT:
            complain("domain-page-shift", f"page_shift {header.page_shift}", 28)
        if not header.xen_major:
            complain("domain-converted", f"by version {header.xen_minor} of the converter", 32)

    def _image(self, layer: Layer, complain: _Complain) -> None:
        if any(other.name == "xl" for other in self.stream.layers) and not self.stream.layer("libxl"):
            complain("xl-without-libxl", "no libxl header between the xl file's and this one")
        image, domain = layer.header(libxc.ImageHeader), layer.header(libxc.DomainHeader)
        if image is None or domain is None or domain.type not in set(GuestType):
            return
        guest = GuestType(domain.type)
        self.layout = Layout(guest, image.version)
        self.pages = PageContext(hvm=guest is GuestType.HVM)

    # Records

    def complain(self, rule: str, message: str, frame: Frame, offset: int | None = None) -> None:
        at = frame.offset if offset is None else offset
        self.verdict.add(rule, message, offset=at, layer=frame.layer.name, record=frame.ref)

    def frame(self, frame: Frame) -> None:
        self._padding_of_previous()
        self._previous = frame
        if isinstance(frame, Segment):
            self._segment(frame)
            return
        if frame.length > MAX_RECORD_LENGTH:
            text = f"the length is {frame.length}, the limit {MAX_RECORD_LENGTH}"
            self.complain("record-length", text, frame, frame.offset + 4)
        if frame.record_class is None:
            rule = "record-optional" if frame.optional else "record-unknown"
            self.complain(rule, f"type {frame.code:#010x}, {frame.length} octets", frame)
        elif frame.layer.name == "libxl":
            self._libxl_record(frame)
            self._fields(frame)
        else:
            self._libxc_record(frame)

    def _segment(self, segment: Segment) -> None:
        for rule, message, offset in check_segment(segment):
            self.complain(rule, message, segment, offset)
        if segment.record_class is envelopes.EndOfImage and self.stream.layer("libxc") is None:
            self.complain("xapi-image-absent", "End comes without an image before it", segment)

    def _padding_of_previous(self) -> None:
        frame = self._previous
        if frame is not None and any(frame.padding):
            at = frame.body_offset + frame.length
            self.complain("record-padding", f"padding {frame.padding.hex()}, not zero", frame, at)

    def _fields(self, frame: Frame) -> None:
        if frame.length > LOOKED_INTO:
            self.complain("body-unusual", f"{frame.length} octets", frame)
            return
        try:
            record = frame.record()
        except TruncatedError:
            raise
        except FormatError as exc:
            self.complain("body-malformed", exc.message, frame, exc.offset)
            return
        for rule, message in check_fields(record, self.guest_width):
            self.complain(rule, message, frame)
        match record:
            case libxc.X86PvInfo():
                self.guest_width = record.guest_width
            case libxc.X86PvP2mFrames():
                self.pages.max_pfn = max(record.p2m_end_pfn, self.pages.max_pfn or 0)

    def _libxc_record(self, frame: Frame) -> None:
        if self.layout is not None:
            self._place(frame, self.layout)
        if frame.is_page_data:
            try:
                for rule, message in check_page_data(frame, self.pages):
                    self.complain(rule, message, frame)
            except FormatError as exc:
                self.complain("body-malformed", exc.message, frame, exc.offset)
        else:
            self._fields(frame)
        if frame.code == libxc.End.code:
            self.image_ended = True
            self._complete(frame)
        elif frame.code == libxc.Checkpoint.code:
            if not self.stream.checkpoints:
                self._complete(frame)
            self.checkpoint_open = self.stream.layer("libxl") is not None

    def _place(self, frame: Frame, layout: Layout) -> None:
        record = frame.record_class
        if record is None:
            return
        vcpu_id = 0
        if issubclass(record, libxc.VcpuRecord) and record.head_size <= frame.length <= LOOKED_INTO:
            decoded = frame.record()
            vcpu_id = decoded.vcpu_id if isinstance(decoded, libxc.VcpuRecord) else 0
        if layout.infers_static_data_end(record):
            text = f"STATIC_DATA_END is inferred before {frame.type_name}"
            self.complain("static-data-inferred", text, frame)
            self._missing_policies(frame, layout)
        for problem in layout.problems(record, vcpu_id):
            rule = _LAYOUT_RULES[problem.kind][not problem.enforced]
            self.complain(rule, problem.message, frame)
        if layout.version < 3 and record in (libxc.StaticDataEnd, *_STATIC_POLICIES):
            self.complain("static-data-in-v2", f"{frame.type_name} in version {layout.version}", frame)
        if record is libxc.StaticDataEnd and not layout.static_data_ended:
            self._missing_policies(frame, layout)
        layout.note(record, vcpu_id)

    def _missing_policies(self, frame: Frame, layout: Layout) -> None:
        missing = [name for record, name in _STATIC_POLICIES.items() if record not in layout.seen]
        if missing:
            self.complain("static-data-missing", f"missing: {', '.join(missing)}", frame)

    def _complete(self, frame: Frame) -> None:
        """Judge whether the image is whole, at its END or first checkpoint."""
        if self.layout is None:
            return
        for problem in self.layout.missing():
            rule = _LAYOUT_RULES[problem.kind][not problem.enforced]
            self.complain(rule, problem.message, frame)

    def _libxl_record(self, frame: Frame) -> None:
        code, image_open = frame.code, self.stream.layer("libxc") is not None
        if code == libxl.LibxcContext.code:
            if image_open:
                self.complain("libxl-context-repeated", "a libxc image was there already", frame)
        elif code == libxl.CheckpointEnd.code:
            if not self.checkpoint_open:
                self.complain("libxl-checkpoint-end", "no libxc CHECKPOINT came before", frame)
            self.checkpoint_open = False
        elif code == libxl.CheckpointState.code:
            if not self.stream.checkpoints:
                self.complain("libxl-checkpoint-state", "no checkpoint came before", frame)
        elif code == libxl.LibxlEnd.code:
            if not image_open:
                self.complain("libxl-context-absent", "the stream ends without a LIBXC_CONTEXT", frame)
            if self.checkpoint_open:
                self.complain("libxl-checkpoint-open", "the stream ends inside a checkpoint", frame)
        elif not image_open:
            self.complain("emulator-before-image", f"{frame.type_name} before LIBXC_CONTEXT", frame)
        elif not self.pages.hvm:
            self.complain("emulator-foreign", f"{frame.type_name} for a PV guest", frame)

    # The end

    def trailer(self, trailer: Trailer) -> None:
        self._padding_of_previous()
        self._previous = None
        start = trailer.read(min(len(XL_CLOSING_MESSAGE), trailer.left or len(XL_CLOSING_MESSAGE)))
        more = trailer.skip()
        outermost = self.stream.layers[0].name
        if start == XL_CLOSING_MESSAGE and not more:
            rule, message = "after-end-xl-message", "domain is yours, you are cleared to unpause"
        else:
            rule, message = "after-end", f"{len(start) + more} octets, starting with {start[:16].hex(' ')}"
        self.verdict.add(rule, message, offset=trailer.offset, layer=outermost)

    def end(self) -> None:
        self._padding_of_previous()
        if self.stream.ending == "checkpoint":
            behind = self.stream.position - self.stream.checkpoint_offset
            self.verdict.add(
                "stream-ends-at-checkpoint",
                f"a restore fails over to checkpoint {self.stream.checkpoints}; "
                f"{behind} octets behind it are void",
                offset=self.stream.position,
                layer=self.stream.layers[0].name,
            )

    def damage(self, error: StreamError) -> None:
        if self.stream.legacy:
            rule = "stream-legacy"
        elif not isinstance(error, TruncatedError):
            rule = "stream-damaged"
        elif self.stream.checkpoints:
            rule = "stream-ends-in-checkpoint"
        else:
            rule = "stream-truncated"
        message = f"{error.message}; {error.hint}" if error.hint else error.message
        self.verdict.add(rule, message, offset=error.offset or 0, layer=error.layer, record=error.record)
