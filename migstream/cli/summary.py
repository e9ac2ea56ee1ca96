"""The summary that ``migstream inspect`` prints for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from migstream.errors import FormatError
from migstream.inspection import Report
from migstream.records import libxc
from migstream.text import printable, size

__all__ = ["summary"]

PASSES_SHOWN = 12
PROPERTIES_SHOWN = 24
KINDS = {
    "xl": "xl save file",
    "libvirt": "libvirt save image",
    "xend": "xend save file",
    "xapi1": "xapi suspend image",
    "xapi": "xapi suspend image",
    "libxl": "libxl stream",
    "libxc": "libxc image",
}
MAKERS: dict[int, str] = {libxc.Hypervisor.QEMU: "of QEMU", libxc.Hypervisor.PROCESS: "memory of a process"}


def summary(report: Report, file: str) -> Iterator[str]:
    """Yield the lines of the summary; text from the stream is escaped."""
    yield f"{printable(file)}: {_headline(report)}"
    if not report.layers:
        return
    yield from _section(
        "layers",
        ["layer", "offset", "version", "byte order", ""],
        [_layer(layer_json, report) for layer_json in _layers(report)],
    )
    if report.domain is not None:
        yield from _section("guest", None, _guest(report))
    if report.records:
        yield from _section(
            "records",
            ["layer", "type", "count", "octets", "first at"],
            [
                [layer, name, str(stats.count), str(stats.bytes), str(stats.first_offset)]
                for layer, types in report.records.items()
                for name, stats in types.items()
            ],
        )
    if report.pages.total.pfns:
        yield from _section("pages", None, _pages(report))
    if report.pages.pass_count > 1:
        yield from _passes(report)
    if report.config is not None:
        yield from _section("config", None, _config(report))


def _headline(report: Report) -> str:
    if not report.layers:
        return "no migration stream"
    kind = KINDS[report.layers[0].name]
    guest = f", {report.guest_type.upper()} guest" if report.guest_type else ""
    maker = f", Xen {report.xen_version}" if report.xen_version else ""
    if report.origin is not None:  # no Xen was there: the version in the header says nothing
        maker = f", {MAKERS.get(report.origin.hypervisor, 'of unknown origin')}"
    if report.legacy:
        state = "holds a legacy stream"
    elif report.error is not None:
        state = "damaged"
    elif report.ending == "checkpoint":
        state = f"ends behind checkpoint {report.checkpoints}"
    else:
        state = "whole"
    return f"{kind}{guest}{maker}, {size(report.octets)}, {state}"


def _layers(report: Report) -> list[dict[str, object]]:
    layers = report.to_json()["layers"]
    assert isinstance(layers, list)
    return layers


def _layer(layer: dict[str, object], report: Report) -> list[str]:
    name = str(layer["name"])
    version = "-" if layer["version"] is None else str(layer["version"])
    found = next(found for found in report.layers if found.offset == layer["offset"])
    said = f"config of {len(found.config)} octets" if found.config is not None else ""
    if name in ("xl", "libvirt", "xend") and not found.config:
        said = "no config"
    return [name, str(layer["offset"]), version, str(layer["byte_order"]), said]


def _guest(report: Report) -> list[list[str]]:
    rows = []
    info = report.pv_info
    kind = f"{(report.guest_type or '').upper()}"
    if isinstance(info, libxc.X86PvInfo):
        kind += f", {8 * info.guest_width}-bit, {info.pt_levels} levels of page tables"
    if report.vcpus:
        kind += f", {len(report.vcpus)} vCPU{'s' * (len(report.vcpus) != 1)}"
    rows.append(["type", kind])
    rows.append(["page size", f"{report.page_size} octets" if report.page_size else "implausible"])
    if report.origin is not None:
        rows += _origin(report.origin)
    present = ", ".join(sorted(report.static_present)) or "none"
    missing = ", ".join(report.static_missing) or "none"
    end = f"{report.static_end} at {report.static_end_offset}" if report.static_end else "absent"
    rows.append(["static data", f"present: {present}; missing: {missing}; end: {end}"])
    if report.checkpoints:
        rows.append(["checkpoints", str(report.checkpoints)])
    return rows


def _origin(origin: libxc.Origin) -> list[list[str]]:
    """Rows on what an image was made of: a line a property."""
    known = origin.hypervisor in set(libxc.Hypervisor)
    name = libxc.Hypervisor(origin.hypervisor).name if known else f"hypervisor {origin.hypervisor}"
    vcpus = f", {origin.vcpus} vCPU{'s' * (origin.vcpus != 1)}" if origin.vcpus else ""
    rows = [["origin", f"{name}{vcpus}, memory of {size(origin.ram_size)}"]]
    try:
        properties = list(origin.properties.items())
    except FormatError as exc:
        return [*rows, ["", f"malformed: {exc.message}"]]
    rows += [["", f"{printable(key)}: {printable(value)}"] for key, value in properties[:PROPERTIES_SHOWN]]
    if len(properties) > PROPERTIES_SHOWN:
        rows.append(["", f"and {len(properties) - PROPERTIES_SHOWN} more"])
    return rows


def _pages(report: Report) -> list[list[str]]:
    stats, total = report.pages, report.pages.total
    rows = [["PFNs", f"{total.pfns} in {total.range_text}, "]]
    more = "" if stats.exact else "at least "
    rows[0][1] += f"{more}{stats.distinct} distinct, {total.pages} with data ({size(total.pages * 4096)})"
    rows += [[name, str(count)] for name, count in total.types_json().items()]
    if total.zero_pages is not None:
        rows.append(["zero pages", str(total.zero_pages)])
    return rows


def _passes(report: Report) -> Iterator[str]:
    stats = report.pages
    rows = [
        [
            str(p.number),
            str(p.offset),
            str(p.records),
            str(p.pfns),
            str(p.pages),
            str(p.checkpoint) if report.checkpoints else "",
            "sent again to be compared" if p.verify else "",
        ]
        for p in stats.passes
    ]
    if len(rows) > PASSES_SHOWN:
        left_out = stats.pass_count - PASSES_SHOWN + 1
        rows = [*rows[: PASSES_SHOWN - 1], ["...", "", "", "", "", "", f"{left_out} more"]]
    heads = [
        "pass",
        "offset",
        "records",
        "PFNs",
        "pages",
        "after checkpoint" if report.checkpoints else "",
        "",
    ]
    yield from _section("passes", heads, rows)


def _config(report: Report) -> list[list[str]]:
    config = report.config
    if not isinstance(config, dict):
        text = str(config)
        return [["text", f"{len(text)} characters (--config prints it)"]]
    rows = []
    for path in ("c_info.name", "c_info.type", "c_info.uuid", "b_info.max_vcpus", "b_info.max_memkb"):
        value: object = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            rows.append([path.split(".")[1], printable(str(value))])
    return [*rows, ["", "(--config prints the whole)"]]


def _section(title: str, heads: Sequence[str] | None, rows: list[list[str]]) -> Iterator[str]:
    """Yield a titled block of aligned columns; columns of numbers are right-aligned."""
    yield ""
    yield title
    table = [list(heads), *rows] if heads else rows
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    numeric = [
        bool(heads) and all(row[i].isdigit() or row[i] in ("", "-", "...") for row in rows)
        for i in range(len(widths))
    ]
    for row in table:
        cells = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numeric, strict=True)
        ]
        yield ("  " + "  ".join(cells)).rstrip()
