"""Mutations of single fields, as the declarations say where and how large they are. Framing stays right."""

from __future__ import annotations

from migstream.fuzzing.mutations.editing import Editing, integers, misfit, patched
from migstream.fuzzing.tree import Header, Node, Raw, Record

__all__ = ["body_length", "config", "count", "entry", "field", "opaque", "raw_integer", "reserved"]


def _head_complete(node: Node) -> bool:
    declared = node.declared
    return declared is not None and declared.head_size > 0 and len(node.body) >= declared.head_size


def field(editing: Editing) -> str | None:
    """Give an integer of a header or a record's head another value, counts and versions included."""
    at = editing.pick(_head_complete)
    if at is None:
        return None
    node = editing.nodes[at]
    assert node.declared is not None
    fields = integers(node.declared)
    if not fields:
        return None
    wire, offset = editing.chance.choice(fields)
    old = int.from_bytes(node.body[offset : offset + wire.size], node.order)
    new = editing.number(wire.size, old, wire)
    editing.nodes[at] = node.with_body(patched(node.body, offset, wire.size, new, node.order))
    return f"{editing.name(at)}: {wire.name} {old:#x} -> {new:#x}"


def _has_count(node: Node) -> bool:
    return _head_complete(node) and any(wire.counts for wire in node.declared.wire_fields)  # type: ignore[union-attr]  # it has one, as _head_complete says


def count(editing: Editing) -> str | None:
    """Let a count say something else than how many there are: readers allocate by it, and multiply it."""
    at = editing.pick(_has_count)
    if at is None:
        return None
    node = editing.nodes[at]
    assert node.declared is not None
    wire = next(wire for wire in node.declared.wire_fields if wire.counts)
    offset = node.declared.offset_of(wire.name)
    old = int.from_bytes(node.body[offset : offset + wire.size], node.order)
    limit = 1 << 8 * wire.size
    turns_over = (limit // 16 + old, limit // 8 + old)  # times an entry's size, it is as before
    boundaries = (0, old - 1, old + 1, *turns_over, limit // 2, limit - 1)
    new = editing.chance.choice((*boundaries, editing.number(wire.size, old))) % limit
    editing.nodes[at] = node.with_body(patched(node.body, offset, wire.size, new, node.order))
    return f"{editing.name(at)}: {wire.name} {old:#x} -> {new:#x}"


def reserved(editing: Editing) -> str | None:
    """Set a bit of a field that is reserved."""
    at = editing.pick(
        lambda node: _head_complete(node) and any(w.reserved for w in node.declared.wire_fields)  # type: ignore[union-attr]  # it has one, as _head_complete says
    )
    if at is None:
        return None
    node = editing.nodes[at]
    assert node.declared is not None
    wire = editing.chance.choice([w for w in node.declared.wire_fields if w.reserved])
    octet = node.declared.offset_of(wire.name) + editing.chance.randrange(wire.size)
    value = node.body[octet] ^ 1 << editing.chance.randrange(8)
    editing.nodes[at] = node.with_body(patched(node.body, octet, 1, value, node.order))
    return f"{editing.name(at)}: octet {octet}, of the reserved field {wire.name}, -> {value:#04x}"


def _has_array(node: Node) -> bool:
    declared = node.declared
    if declared is None or not declared.wire_fields or declared.wire_fields[-1].kind != "array":
        return False
    return len(node.body) >= declared.head_size + declared.wire_fields[-1].size


def entry(editing: Editing) -> str | None:
    """Give an integer within one element of an array another value."""
    at = editing.pick(_has_array)
    if at is None:
        return None
    node = editing.nodes[at]
    declared = node.declared
    assert declared is not None
    array = declared.wire_fields[-1]
    unit = array.entry.head_size if array.entry else array.size
    count = (len(node.body) - declared.head_size) // unit
    if declared.wire_fields[0].counts:  # pages may follow the array
        count = min(count, int.from_bytes(node.body[:4], node.order)) or 1
    index = editing.chance.randrange(count)
    wire, offset = editing.chance.choice(integers(array.entry)) if array.entry else (array, 0)
    offset += declared.head_size + index * unit
    old = int.from_bytes(node.body[offset : offset + wire.size], node.order)
    new = editing.number(wire.size, old, wire)
    editing.nodes[at] = node.with_body(patched(node.body, offset, wire.size, new, node.order))
    where = f"{array.name}[{index}]" + (f".{wire.name}" if array.entry else "")
    return f"{editing.name(at)}: {where} {old:#x} -> {new:#x}"


def body_length(editing: Editing) -> str | None:
    """Make a body longer or shorter, at its end; the record's length fits the new body."""
    at = editing.pick(lambda node: isinstance(node, Record))
    if at is None:
        return None
    node = editing.nodes[at]
    by = editing.chance.choice((-16, -9, -8, -7, -4, -1, 1, 4, 7, 8, 9, 16))
    way = editing.chance.randrange(8)
    body = b"" if way == 0 else node.body[:by] if by < 0 else node.body + bytes(by)
    if body == node.body:
        return None
    editing.nodes[at] = node.with_body(body)
    return f"{editing.name(at)}: body of {len(node.body)} octets -> {len(body)}"


def opaque(editing: Editing) -> str | None:
    """Damage a body without regard to its fields, but for the record's length."""
    at = editing.pick(lambda node: not isinstance(node, Header) and node.body)
    if at is None:
        return None
    node = editing.nodes[at]
    body, step = misfit(editing, node.body)
    editing.nodes[at] = node.with_body(body)
    return f"{editing.name(at)}: {step}"


def config(editing: Editing) -> str | None:
    """Damage the config in an envelope; the length in its header fits."""
    at = editing.pick(lambda node: isinstance(node, Header) and node.content)
    if at is None:
        return None
    node = editing.nodes[at]
    assert isinstance(node, Header)
    whole = editing.chance.randrange(4)
    content, step = (b"", "emptied") if whole == 0 else misfit(editing, node.content)
    editing.nodes[at] = node.with_content(content)
    return f"{editing.name(at)}: config: {step}"


def raw_integer(editing: Editing) -> str | None:
    """Put another integer into octets that have no declaration: a legacy stream's, above all."""
    at = editing.pick(lambda node: isinstance(node, Raw) and len(node.body) >= 4)
    if at is None:
        return None
    node = editing.nodes[at]
    size = editing.chance.choice((2, 4, 8))
    reach = min(len(node.body), 64 if editing.chance.randrange(4) else 1 << 20)
    offset = editing.chance.randrange(0, max(reach - size, 0) + 1, min(size, 4))
    old = int.from_bytes(node.body[offset : offset + size], node.order)
    new = editing.number(size, old)
    editing.nodes[at] = node.with_body(patched(node.body, offset, size, new, node.order))
    return f"{editing.name(at)}: u{8 * size} at {offset} {old:#x} -> {new:#x}"
