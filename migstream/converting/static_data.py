"""Policies for a stream that lacks them: from a JSON file, or from another stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from migstream.converting.options import ConvertError
from migstream.io import reader
from migstream.records import PageData, libxc

__all__ = ["read_policy"]

Policy = TypeVar("Policy", libxc.X86CpuidPolicy, libxc.X86MsrPolicy)

MAX_JSON = 1 << 20  # octets; a policy of every leaf that Xen knows has some 20 KiB


def read_policy(path: str, kind: type[Policy]) -> Policy:
    """Return the policy record of class ``kind`` that the file ``path`` holds.

    A JSON file has the fields as `Record.to_json` gives them, by themselves, under ``fields``, as a line of
    ``inspect --jsonl`` has them, or as such a list without anything around it. Any other file is read as a
    stream. Raises `ConvertError` where there is none, `StreamError` and `OSError`.
    """
    with Path(path).open("rb") as file:
        start = file.read(MAX_JSON + 1)
    if start.lstrip()[:1] in (b"{", b"["):
        return _from_json(path, start, kind)
    with reader.open(path) as stream:
        for frame in stream:
            if frame.record_class is kind:
                record = frame.record()
                assert isinstance(record, kind)
                return record
            if frame.record_class in (libxc.StaticDataEnd, PageData):
                break
    raise ConvertError(f"{path} has no {kind.type}")


def _from_json(path: str, octets: bytes, kind: type[Policy]) -> Policy:
    if len(octets) > MAX_JSON:
        raise ConvertError(f"{path} has more than {MAX_JSON} octets: it is no policy")
    try:
        value = _policy_value(octets, kind)
        fields = value if isinstance(value, dict) else {kind.wire_fields[0].name: value}
        return kind.from_json(fields)
    except (ValueError, RecursionError) as exc:
        raise ConvertError(f"{path} is not {kind.type} as JSON: {exc}") from None


def _policy_value(octets: bytes, kind: type[Policy]) -> object:
    """Return the policy's value: of a single JSON value, or of the line of several that is of its type."""
    try:
        value = json.loads(octets)
    except ValueError:
        lines = [json.loads(line) for line in octets.splitlines() if line.strip()]
        value = next((line for line in lines if isinstance(line, dict) and kind.type in line.values()), None)
        if value is None:
            raise ValueError(f"no line is of the type {kind.type}") from None
    return value.get("fields", value) if isinstance(value, dict) else value
