"""Hypothesis strategies for streams, for the tests of whoever reads or writes them.

Install ``migstream[fuzz]``, then::

    from hypothesis import given
    from migstream.testing import damaged, streams

    @given(streams(guest="hvm"))
    def test_my_reader_takes_what_is_sound(stream: bytes) -> None: ...

    @given(damaged(streams()))
    def test_my_reader_survives_what_is_not(stream: bytes) -> None: ...

`records` gives single records and headers with any values that their declarations allow; `streams` whole
streams that are sound; `damaged` mutates streams, and a falsifying example says how. ``docs/testing.md`` has
more.
"""

from __future__ import annotations

from migstream.testing.damage import damaged
from migstream.testing.octets import StreamOctets
from migstream.testing.records import records
from migstream.testing.streams import N_PAGES, streams

__all__ = ["N_PAGES", "StreamOctets", "damaged", "records", "streams"]
