"""What is in a stream: layers, records, pages, passes, static data, config.

`inspect` walks a stream once and adds everything up; it never judges (`migstream.verification` does) and
never gives up on what it can frame. `Report.to_json` is the documented form: ``spec/inspect.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from migstream.errors import StreamError
from migstream.io.reader import Frame, Layer, Stream, Trailer
from migstream.page_stats import Batch, PageStats
from migstream.records import Record, envelopes, libxc, libxl, xl
from migstream.records.libxc import GuestType
from migstream.text import decode

__all__ = ["JSON_VERSION", "Line", "Report", "inspect"]

JSON_VERSION = 1  # of the report's JSON form; raised when a key changes its meaning or goes
DECODED = 8 << 20  # octets of a body that are decoded; longer ones are shown by their length
FIELDS_SHOWN = 64 << 10  # octets of a body whose fields a line carries in full
TYPES_KEPT = 256  # types of records told apart; a hostile stream could have 2^32

_POLICIES = {libxc.X86CpuidPolicy: "CPUID", libxc.X86MsrPolicy: "MSR"}


@dataclass
class TypeStats:
    """Records of one type."""

    code: int
    count: int = 0
    bytes: int = 0
    first_offset: int = 0

    def to_json(self) -> dict[str, int]:
        """Return count, bytes (of the bodies), the type code and the first one's offset."""
        return dict(vars(self))


class Line:
    """One record, as ``--records`` and ``--jsonl`` show it.

    ``record`` is the decoded body, if it was decoded; of PAGE_DATA there are ``pages`` instead;
    ``error`` says why a body does not fit its type.
    """

    def __init__(self, frame: Frame) -> None:
        self.index = frame.index
        self.offset = frame.offset
        self.layer = frame.layer.name
        self.type = frame.type_name
        self.code = frame.code
        self.length = frame.length
        self.record: Record | None = None
        self.pages: Batch | None = None
        self.error: str | None = None

    @property
    def text(self) -> str:
        """What the record holds, in one line."""
        from migstream.describe import describe

        if self.error is not None:
            return self.error
        if self.pages is not None:
            return self.pages.text
        return describe(self.record) if self.record is not None else f"{self.length} octets, not decoded"

    def to_json(self) -> dict[str, object]:
        """Return the line as one JSON object."""
        out: dict[str, object] = {
            "record": self.index,
            "offset": self.offset,
            "layer": self.layer,
            "type": self.type,
            "code": self.code,
            "length": self.length,
        }
        if self.pages is not None:
            out["pages"] = {
                "by_type": self.pages.types_json(),
                "pfn_min": self.pages.lowest,
                "pfn_max": self.pages.highest,
                "zero": self.pages.zero_pages,
            }
        elif self.record is not None and self.length <= FIELDS_SHOWN:
            out["fields"] = self.record.to_json()
        if self.error is not None:
            out["error"] = self.error
        return out


@dataclass
class Report:
    """Everything that `inspect` found out. Grows while the stream is read."""

    layers: list[Layer] = field(default_factory=list)
    records: dict[str, dict[str, TypeStats]] = field(default_factory=dict)
    pages: PageStats = field(default_factory=PageStats)
    checkpoints: int = 0
    static_present: set[str] = field(default_factory=set)
    static_end: str | None = None
    static_end_offset: int | None = None
    vcpus: set[int] = field(default_factory=set)
    pv_info: libxc.X86PvInfo | None = None
    origin: libxc.Origin | None = None
    xenops: str | None = None
    verify: bool = False
    legacy: bool = False
    ending: str | None = None
    octets: int = 0
    trailer: tuple[int, int] | None = None
    error: StreamError | None = None

    def _header(self, kind: type[libxc.DomainHeader]) -> libxc.DomainHeader | None:
        return next((h for layer in self.layers if (h := layer.header(kind)) is not None), None)

    @property
    def domain(self) -> libxc.DomainHeader | None:
        """The libxc domain header, if there is one."""
        return self._header(libxc.DomainHeader)

    @property
    def guest_type(self) -> str | None:
        """``pv``, ``hvm``, a number for another type, or ``None`` without a libxc image."""
        if self.domain is None:
            return None
        known = self.domain.type in set(GuestType)
        return GuestType(self.domain.type).name.lower() if known else str(self.domain.type)

    @property
    def page_size(self) -> int | None:
        """Octets of a guest page as the domain header says; ``None`` without one, or past 2^63."""
        return None if self.domain is None or self.domain.page_shift > 63 else 1 << self.domain.page_shift

    @property
    def xen_version(self) -> str | None:
        """The Xen that saved, such as ``4.17``."""
        return None if self.domain is None else f"{self.domain.xen_major}.{self.domain.xen_minor}"

    @property
    def static_missing(self) -> list[str]:
        """Policies that a restore will report as missing."""
        return [] if self.domain is None else [p for p in _POLICIES.values() if p not in self.static_present]

    @property
    def config(self) -> object:
        """The envelope's config: an xl file's JSON value, or text: what is no JSON, XML, an S-expression."""
        configs = [self.xenops, *(layer.config_text for layer in self.layers)]
        text = next((config for config in configs if config is not None), None)
        if text is None or self.layers[0].name != "xl":
            return text
        import json

        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text

    def to_json(self) -> dict[str, object]:
        """Return the report in its documented form (``spec/inspect.md``)."""
        total = self.pages.total
        return {
            "schema": f"migstream-inspect-{JSON_VERSION}",
            "layers": [_layer_json(layer) for layer in self.layers],
            "guest_type": self.guest_type,
            "page_size": self.page_size,
            "xen_version": self.xen_version,
            "vcpus": len(self.vcpus),
            "records": {
                layer: {name: stats.to_json() for name, stats in types.items()}
                for layer, types in self.records.items()
            },
            "pages": {
                "by_type": total.types_json(),
                "pfns": total.pfns,
                "with_data": total.pages,
                "pfn_min": total.lowest,
                "pfn_max": total.highest,
                "distinct": self.pages.distinct,
                "distinct_exact": self.pages.exact,
                "zero": total.zero_pages,
            },
            "passes": [p.to_json() for p in self.pages.passes],
            "pass_count": self.pages.pass_count,
            "checkpoints": self.checkpoints,
            "static_data": {
                "present": sorted(self.static_present),
                "missing": self.static_missing,
                "end": self.static_end,
                "end_offset": self.static_end_offset,
            },
            "config": self.config,
            "ending": self.ending,
            "trailer": None
            if self.trailer is None
            else dict(zip(("offset", "bytes"), self.trailer, strict=True)),
            "bytes": self.octets,
            "error": None if self.error is None else self.error.to_json(),
        }


def _layer_json(layer: Layer) -> dict[str, object]:
    version = options = None
    for header in layer.headers:
        match header:
            case libxl.LibxlHeader() | libxc.ImageHeader():
                version, options = header.version, header.options
            case xl.SaveFileHeader():
                options = header.mandatory_flags
            case envelopes.LibvirtHeader():
                version = header.version
            case envelopes.XapiHeader():
                version = 2
            case envelopes.Xapi1Header():
                version = 1
    return {
        "name": layer.name,
        "offset": layer.offset,
        "version": version,
        "options": options,
        "byte_order": layer.order,
    }


def inspect(stream: Stream, report: Report, *, count_zero: bool = False) -> Iterator[Line]:
    """Read ``stream`` into ``report``, yielding a `Line` for each record on the way.

    A record whose body does not fit its type is noted (``Report.error`` keeps the first) and passed
    over. What ends the reading early goes to ``Report.error`` too; only errors of the input itself
    (`OSError`, `DeadlineError`) are raised. ``count_zero`` reads every page.
    """
    try:
        for item in stream.items():
            match item:
                case Layer():
                    report.layers.append(item)
                case Frame():
                    yield _frame(item, report, stream, count_zero)
                case Trailer():
                    report.trailer = (item.offset, item.skip())
    except StreamError as exc:
        if report.error is None:
            report.error = exc
    report.ending = stream.ending
    report.legacy = stream.legacy
    report.octets = stream.position
    report.checkpoints = stream.checkpoints


def _frame(frame: Frame, report: Report, stream: Stream, count_zero: bool) -> Line:
    line = Line(frame)
    _count(line, report)
    try:
        if frame.is_page_data:
            line.pages = report.pages.add(
                frame, checkpoint=stream.checkpoints, verify=report.verify, count_zero=count_zero
            )
        elif frame.length <= DECODED:
            line.record = frame.record()
            _note(line.record, report)
    except StreamError as exc:
        line.error = exc.message
        if report.error is None:
            report.error = exc
    if report.static_end is None:
        _static_end(frame, report)
    return line


def _count(line: Line, report: Report) -> None:
    types = report.records.setdefault(line.layer, {})
    name = line.type if line.type in types or len(types) < TYPES_KEPT else "OTHER"
    stats = types.get(name)
    if stats is None:
        stats = types[name] = TypeStats(line.code, first_offset=line.offset)
    stats.count += 1
    stats.bytes += line.length


def _note(record: Record, report: Report) -> None:
    match record:
        case libxc.X86PvInfo():
            report.pv_info = record
        case libxc.Origin():
            report.origin = record
        case libxc.X86PvVcpuBasic():
            if len(report.vcpus) < 1 << 13:  # Xen's own limit of vCPUs
                report.vcpus.add(record.vcpu_id)
        case libxc.X86CpuidPolicy() | libxc.X86MsrPolicy():
            report.static_present.add(_POLICIES[type(record)])
        case libxc.Verify():
            report.verify = True
        case envelopes.Xenops() if report.xenops is None:
            report.xenops = decode(record.config.rstrip(b"\0"))


def _static_end(frame: Frame, report: Report) -> None:
    """Note where static data end: at STATIC_DATA_END, or for version 2 where a restore infers it."""
    declared, domain = frame.record_class, report.domain
    if declared is None or domain is None:
        return
    if frame.layer.name != "libxc" or domain.type not in set(GuestType):
        return
    if declared is libxc.StaticDataEnd:
        report.static_end, report.static_end_offset = "explicit", frame.offset
        return
    image = frame.layer.header(libxc.ImageHeader)
    if image is not None and image.version < 3:
        from migstream.layout import Layout

        if Layout(GuestType(domain.type), image.version).infers_static_data_end(declared):
            report.static_end, report.static_end_offset = "inferred", frame.offset
