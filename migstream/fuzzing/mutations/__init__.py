"""Everything that may be done to a stream, as one table.

Each mutation edits the nodes of an `Editing` and says in words what it did, or ``None`` where the stream
has nothing that it applies to. Framing stays right but for those under ``framing``.
"""

from __future__ import annotations

from dataclasses import dataclass

from migstream.fuzzing.mutations import bodies, fields, framing, layout, pages, records
from migstream.fuzzing.mutations.editing import Editing, Mutate

__all__ = ["MUTATIONS", "Editing", "Mutate", "Mutation"]


@dataclass(frozen=True, slots=True)
class Mutation:
    """One way to mutate. ``weight``: how often it is tried, against the others'."""

    name: str
    weight: int
    apply: Mutate


MUTATIONS: tuple[Mutation, ...] = (
    # fields, as the declarations have them
    Mutation("field", 8, fields.field),
    Mutation("any-count", 4, fields.count),
    Mutation("reserved", 3, fields.reserved),
    Mutation("entry", 5, fields.entry),
    Mutation("body-length", 4, fields.body_length),
    Mutation("opaque", 4, fields.opaque),
    Mutation("config", 2, fields.config),
    Mutation("raw-integer", 4, fields.raw_integer),
    # whole records
    Mutation("drop", 4, records.drop),
    Mutation("duplicate", 4, records.duplicate),
    Mutation("move", 4, records.move),
    Mutation("swap", 3, records.swap),
    Mutation("foreign", 4, records.foreign),
    Mutation("made", 3, records.made),
    Mutation("unknown", 3, records.unknown),
    Mutation("retype", 3, records.retype),
    # the plan of a stream
    Mutation("splice", 3, layout.splice),
    Mutation("second-end", 2, layout.second_end),
    Mutation("add-checkpoint", 2, layout.add_checkpoint),
    Mutation("drop-checkpoint", 2, layout.drop_checkpoint),
    Mutation("move-checkpoint", 2, layout.move_checkpoint),
    Mutation("late-static-data", 2, layout.late_static_data),
    Mutation("state-first", 2, layout.state_first),
    Mutation("another-header", 2, layout.another_header),
    # PAGE_DATA
    Mutation("count", 4, pages.count),
    Mutation("pages", 3, pages.pages),
    Mutation("pfn", 4, pages.pfn),
    Mutation("pfn-collision", 3, pages.pfn_collision),
    Mutation("type", 4, pages.type),
    Mutation("reserved-bits", 2, pages.reserved_bits),
    Mutation("table-entry", 2, pages.table_entry),
    Mutation("split", 2, pages.split),
    # bodies with a grammar of their own
    Mutation("xenstore", 3, bodies.xenstore),
    Mutation("hvm-entry", 3, bodies.hvm_entry),
    # framing, broken on purpose
    Mutation("length", 4, framing.length),
    Mutation("config-length", 2, framing.content_length),
    Mutation("padding", 3, framing.padding),
    Mutation("byte-order", 1, framing.byte_order),
    Mutation("cut", 3, framing.cut),
    Mutation("noise", 3, framing.noise),
)
