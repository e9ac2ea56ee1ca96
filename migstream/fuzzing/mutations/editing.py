"""What every mutation works with: the nodes, the chance, the rest of the corpus."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from migstream.fuzzing.tree import Node, Record
from migstream.records import ByteOrder, Declaration
from migstream.records.fields import WireField

__all__ = ["Editing", "Mutate", "integers", "misfit", "patched"]


@dataclass(slots=True)
class Editing:
    """A stream being mutated. ``nodes`` is edited in place; ``other`` gives the nodes of another stream."""

    nodes: list[Node]
    chance: random.Random
    other: Callable[[], list[Node]]

    def places(self, suits: Callable[[Node], object]) -> list[int]:
        """Return the places of the nodes that suit."""
        return [i for i, node in enumerate(self.nodes) if suits(node)]

    def pick(self, suits: Callable[[Node], object]) -> int | None:
        """Return the place of one node that suits, ``None`` if there is none."""
        found = self.places(suits)
        return self.chance.choice(found) if found else None

    def anywhere(self) -> int | None:
        """Return the place of one node, ``None`` if there is none."""
        return self.chance.randrange(len(self.nodes)) if self.nodes else None

    def record(self, layer: str, code: int) -> tuple[int, Record] | None:
        """Return the place of one record of this type, and the record."""
        found = [
            (i, node)
            for i, node in enumerate(self.nodes)
            if isinstance(node, Record) and node.code == code and node.layer == layer
        ]
        return self.chance.choice(found) if found else None

    def name(self, place: int) -> str:
        """Return how a step names a node."""
        return f"node {place} ({self.nodes[place].label})"

    def number(self, size: int, value: int, names: WireField | None = None) -> int:
        """Return another value for an unsigned integer of ``size`` octets: mostly one at some boundary."""
        chance = self.chance
        limit = 1 << 8 * size
        way = chance.randrange(8)
        if way == 0:
            return (value + chance.choice((-1, 1))) % limit
        if way == 1:
            return value ^ 1 << chance.randrange(8 * size)
        if way == 2 and names is not None and names.names is not None:
            return int(chance.choice(list(names.names)))
        return chance.choice(_boundaries(size))


#: What a mutation does: edit, and return the step in words, or ``None`` where there is nothing to edit.
Mutate = Callable[[Editing], str | None]


@cache
def _boundaries(size: int) -> tuple[int, ...]:
    """Return values at which readers' arithmetic turns over, for unsigned integers of ``size`` octets."""
    bits = range(3, 8 * size + 1)
    around = {(1 << bit) + near for bit in bits for near in (-1, 0, 1)}
    return tuple(sorted({0, 1, 2, 3} | {value for value in around if value < 1 << 8 * size}))


_INTEGERS: dict[type[Declaration], list[tuple[WireField, int]]] = {}


def integers(declared: type[Declaration]) -> list[tuple[WireField, int]]:
    """Return the integer fields of the fixed head of ``declared``, each with its offset."""
    found = _INTEGERS.get(declared)
    if found is None:
        ints = [wire for wire in declared.wire_fields if wire.kind == "int"]
        found = _INTEGERS[declared] = [(wire, declared.offset_of(wire.name)) for wire in ints]
    return found


def patched(octets: bytes, at: int, size: int, value: int, order: ByteOrder) -> bytes:
    """Return ``octets`` with the integer at ``at`` replaced."""
    return octets[:at] + value.to_bytes(size, order) + octets[at + size :]


def misfit(editing: Editing, octets: bytes) -> tuple[bytes, str]:
    """Return opaque octets with a bit flipped, a piece replaced, grown or shrunk, and the step in words."""
    chance = editing.chance
    at = chance.randrange(len(octets) + 1)
    way = chance.randrange(4) if octets else 2
    if way == 0:
        at = min(at, len(octets) - 1)
        bit = 1 << chance.randrange(8)
        return octets[:at] + bytes([octets[at] ^ bit]) + octets[at + 1 :], f"octet {at} ^ {bit:#04x}"
    length = chance.choice((1, 2, 4, 7, 8, 9, 16))
    if way == 1:
        return octets[:at] + octets[at + length :], f"{length} octets out at {at}"
    new = chance.choice((bytes(length), b"\xff" * length, chance.randbytes(length)))
    if way == 2:
        return octets[:at] + new + octets[at:], f"{length} octets put in at {at}"
    return octets[:at] + new + octets[at + length :], f"{length} octets replaced at {at}"
