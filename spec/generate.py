"""Fill the generated parts of the specification: field tables from the declarations, rules from verify.

    python -m spec.generate           rewrite what is stale
    python -m spec.generate --check   exit 1 if anything is

In a page, a table stands between ``<!-- fields libxc.ImageHeader -->`` and ``<!-- end -->``; the page itself
is written by hand.
"""

from __future__ import annotations

import re
import sys
from enum import IntEnum
from pathlib import Path

from migstream.layout import TABLE, Required
from migstream.legacy.chunks import CHUNKS
from migstream.records import Declaration, envelopes, libxc, libxl, record_types, xl
from migstream.records.hvm_params import HvmParam
from migstream.records.page_types import PageType
from migstream.transport import messages
from migstream.verification.rules import RULES, Severity

HERE = Path(__file__).parent
MODULES = {"envelopes": envelopes, "libxc": libxc, "libxl": libxl, "messages": messages, "xl": xl}
MARK = re.compile(r"(<!-- (fields|enum|types|layout|chunks) ?(\S*) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [heads, ["---"] * len(heads), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fields(name: str) -> str:
    """Return the field table of the declaration ``module.Class``."""
    module, _, class_name = name.partition(".")
    declared = getattr(MODULES[module], class_name)
    assert issubclass(declared, Declaration)
    rows, offset = [], 0
    for wire in declared.wire_fields:
        meaning = wire.doc
        if wire.names is not None:
            meaning += ": " + ", ".join(
                f"{member.value} {member.name}" for member in wire.names if len(wire.names) < 8
            )
        rows.append([str(offset), wire.wire_type, f"`{wire.name}`", meaning.removesuffix(": "), wire.unit])
        offset += wire.size if not wire.variable else 0
    if declared.payload:
        rows.append(["", "pages", "", declared.payload, ""])
    if not rows:
        return "No fields: the body is empty.\n"
    return table(["offset", "type", "field", "meaning", "unit"], rows)


def enum(name: str) -> str:
    """Return the values of an enumeration."""
    known: dict[str, type[IntEnum]] = {"HvmParam": HvmParam, "PageType": PageType}
    if name == "PageType":
        return table(
            ["type", "name", "has data", "gets memory"],
            [[f"{t.value:#x}", t.name, _yes(t.has_data), _yes(t.populated)] for t in PageType],
        )
    return table(["value", "name"], [[str(member.value), member.name] for member in known[name]])


def _yes(value: bool) -> str:
    return "yes" if value else ""


def types(layer: str) -> str:
    """Return the record types of a layer."""
    return table(
        ["type", "name", "what it is"],
        [[f"0x{cls.code:08x}", cls.type, (cls.__doc__ or "").split("\n")[0]] for cls in record_types(layer)],
    )


def layout(_: str) -> str:
    """Return the layout table; a need in parentheses is the specification's alone, not enforced by Xen."""
    rows = []
    for place in TABLE.values():
        needs = [n.record.type if n.enforced else f"({n.record.type})" for n in place.needs]
        remarks = [
            text
            for text, applies in (
                ("once in an image", place.once),
                ("once in each state", place.per_checkpoint),
                ("checkpointed streams only", place.checkpointed_only),
                ("back channel only", place.back_channel),
                ("deprecated", place.deprecated),
                ("required", place.required is Required.YES),
                ("usual", place.required is Required.USUAL),
            )
            if applies
        ]
        guests = "/".join(sorted(guest.name for guest in place.guests)) or "none"
        rows.append([place.record.type, place.phase.value, guests, ", ".join(needs), ", ".join(remarks)])
    return table(["record", "part", "guests", "after", "remarks"], rows)


def chunks(_: str) -> str:
    """Return the chunks of a legacy stream."""
    return table(
        ["id", "name", "what it says", "what follows the id", "HVM parameter"],
        [
            [str(c.id), c.name, c.meaning, c.body.value, c.param.name if c.param is not None else ""]
            for c in CHUNKS.values()
        ],
    )


MAKERS = {"fields": fields, "enum": enum, "types": types, "layout": layout, "chunks": chunks}


def rules() -> str:
    """Return the page of verify's rules."""
    meaning = {
        Severity.ERROR: "a restore refuses the stream, or loses something",
        Severity.WARNING: "against the specification, but Xen's own restore takes it; counts with `--strict`",
        Severity.NOTE: "nothing wrong; worth knowing",
    }
    parts = [
        "# The rules of `migstream verify`\n\n",
        "Generated from the table in the package's `verification/rules.py` by `make spec`; do not edit. A\n"
        "stream is sound when none of its findings is an error. Rules judge by the specification (Xen's\n"
        "docs/specs); each names the section, or the file of Xen, that it stands on.\n",
    ]
    for severity in Severity:
        chosen = [rule for rule in RULES.values() if rule.severity is severity]
        parts.append(f"\n## {severity.value.capitalize()}s ({len(chosen)}): {meaning[severity]}\n\n")
        parts.append(
            table(
                ["rule", "what it says", "reference"], [[f"`{r.id}`", r.title, r.reference] for r in chosen]
            )
        )
    return "".join(parts)


def pages() -> dict[Path, str]:
    """Return every page with its generated parts as they ought to be."""
    made = {
        path: MARK.sub(lambda m: m[1] + MAKERS[m[2]](m[3]) + m[4], path.read_text())
        for path in sorted(HERE.glob("*.md"))
        if path.name != "rules.md"
    }
    made[HERE / "rules.md"] = rules()
    return made


def stale() -> dict[Path, str]:
    """Return the pages whose committed form differs from what the code says."""
    return {path: text for path, text in pages().items() if not path.exists() or path.read_text() != text}


def main() -> int:
    """Run the command; return its exit code."""
    outdated = stale()
    if "--check" in sys.argv[1:]:
        for path in outdated:
            print(f"{path.name} is stale: run 'make spec'")
        return int(bool(outdated))
    for path, text in outdated.items():
        path.write_text(text)
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
