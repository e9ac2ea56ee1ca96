"""Make the corpus in ``data/`` from the cases: ``python -m spec.vectors.make``; ``--check`` compares only.

Streams and expectations come from the groups below, which are written by hand. Only the decoded JSON is
migstream's own work, which tests/test_vectors_decoded.py holds against a second decoder.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

from migstream.conformance import FORMAT, decode
from spec.vectors.case import Case

DATA = Path(__file__).parent / "data"

#: Group -> what is in it. The module of that name here has its CASES.
GROUPS = {
    "rules": "each rule of verify, broken by one stream",
    "sound": "streams by the specification",
    "layout": "which record may stand where",
    "hvm": "HVM images: headers, bodies and pages at their boundaries",
    "paravirtual": "PV images: what holds a PV guest together, and its records at their boundaries",
    "truncated": "streams that end too early, one at each kind of place",
    "checkpoints": "Remus and COLO, bare and in libxl",
    "toolstack": "libxl streams: headers, records, the emulator's data",
    "envelopes": "xl, libvirt, xend, xapi, compressed files, and files that are something else",
    "legacy": "streams of version 1, of both word sizes",
    "origin": "the optional record ORIGIN, which is migstream's own",
}

LINE = 100  # characters
# An octet 24 times or more, or eight octets four times or more, are written once and counted.
_RUN = re.compile(rb"(.)\1{23,}|(.{8})\2{3,}", re.DOTALL)


def cases(group: str) -> list[Case]:
    """Return a group's cases."""
    found: list[Case] = importlib.import_module(f"spec.vectors.{group}").CASES
    return found


def corpus() -> dict[str, str]:
    """Return the text of every file of the corpus, by name."""
    files: dict[str, str] = {}
    listed: list[dict[str, object]] = []
    for group in GROUPS:
        members = cases(group)
        files[f"{group}.hex"] = "".join(f"[{case.name}]\n{to_hex(case.octets)}\n\n" for case in members)
        files[f"{group}.json"] = _object({case.name: decode(case.octets) for case in members})
        listed += [_entry(group, case) for case in members]
    names = [str(entry["name"]) for entry in listed]
    assert len(set(names)) == len(names), "two cases have one name"
    index: dict[str, object] = {"format": FORMAT, "groups": GROUPS, "vectors": listed}
    files["index.json"] = _object(index)
    return files


def _entry(group: str, case: Case) -> dict[str, object]:
    values = {key: value for key, value in vars(case).items() if key not in {"octets", "name"}}
    if case.reference is None:
        del values["reference"]
    return {"name": case.name, "group": group, **values}


def to_hex(octets: bytes) -> str:
    """Return octets as the corpus writes them: groups of up to eight in hex, ``hex*n`` for repeated ones."""
    tokens: list[str] = []
    at = 0
    for run in _RUN.finditer(octets):
        tokens += _groups(octets[at : run.start()])
        unit = run[1] or run[2]
        tokens.append(f"{unit.hex()}*{len(run[0]) // len(unit)}")
        at = run.end()
    tokens += _groups(octets[at:])
    lines = [""]
    for token in tokens:
        if len(lines[-1]) + len(token) >= LINE:
            lines.append("")
        lines[-1] += f" {token}" if lines[-1] else token
    return "\n".join(lines)


def _groups(octets: bytes) -> list[str]:
    return [octets[at : at + 8].hex() for at in range(0, len(octets), 8)]


def _object(value: dict[str, object]) -> str:
    """Return JSON with a line for each member, and for each element of a list in it."""
    lines = []
    for key, member in value.items():
        if isinstance(member, list):
            text = "[\n" + ",\n".join(_dumps(item) for item in member) + "\n]"
        else:
            text = _dumps(member)
        lines.append(f"{_dumps(key)}:{text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True)


def stale() -> list[str]:
    """Return the names of files that are not what the cases say, or that nothing makes."""
    wanted = corpus()
    there = {path.name for path in DATA.iterdir()} if DATA.exists() else set()
    changed = {name for name in wanted if name not in there or (DATA / name).read_text() != wanted[name]}
    return sorted(changed | there - wanted.keys())


def main() -> None:
    """Write the corpus, or check it."""
    if "--check" in sys.argv:
        sys.exit("stale: " + ", ".join(stale()) if stale() else 0)
    for name in stale():
        (DATA / name).unlink(missing_ok=True)
    DATA.mkdir(exist_ok=True)
    for name, text in corpus().items():
        (DATA / name).write_text(text)


if __name__ == "__main__":
    main()
