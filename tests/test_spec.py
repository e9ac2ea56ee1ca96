"""The committed specification is what the declarations say."""

from __future__ import annotations

from migstream.records import record_types
from spec import generate


def test_no_page_is_stale() -> None:
    assert [path.name for path in generate.stale()] == []


def test_every_record_has_a_field_table() -> None:
    for layer in ("libxc", "libxl"):
        page = (generate.HERE / f"{layer}.md").read_text()
        missing = [
            cls.__name__
            for cls in record_types(layer)
            if f"<!-- fields {layer}.{cls.__name__} -->" not in page
        ]
        assert missing == []
