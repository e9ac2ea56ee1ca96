"""The decoded JSON of the conformance corpus, held against what a decoder of its own makes of the octets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from migstream.conformance import Vector, load_vectors
from tests.second_decoder import records

VECTORS = load_vectors()

#: Vectors of which the second decoder knows too little to say anything, and why.
NOT_DECODED = {
    "packed-zstd": "compressed",
    "packed-gzip": "compressed",
    "packed-xz": "compressed",
    "packed-cut": "compressed",
    "xl-optional-data-short": "an envelope that is damaged in its head",
    "xl-config-too-long": "an envelope that is damaged in its head",
    "libxl-64-images": "migstream gives up at header 64, which is a limit of its own",
}


def plain(value: Any) -> Any:
    """Leave out names, which are migstream's own, and what is told only when it is asked for."""
    if isinstance(value, Mapping):
        return {
            key: plain(item)
            for key, item in value.items()
            if not key.endswith("_name") and key not in {"type", "zero"}
        }
    return [plain(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "vector", [v for v in VECTORS if v.name not in NOT_DECODED], ids=lambda vector: vector.name
)
def test_the_decoded_records_are_those_that_a_second_decoder_finds(vector: Vector) -> None:
    expected = [record for record in vector.decoded["records"] if record["layer"] != "xapi"]
    found = list(records(vector.octets))
    assert found == plain(expected)
    pages = [record["pages"] for record in found if "pages" in record]
    by_type = vector.decoded["pages"]["by_type"]
    for name in by_type:
        assert by_type[name] == sum(page["by_type"].get(name, 0) for page in pages)


def test_what_the_second_decoder_leaves_out_is_there() -> None:
    assert NOT_DECODED.keys() <= {vector.name for vector in VECTORS}
    assert sum(bool(list(records(vector.octets))) for vector in VECTORS) > 350
