"""Mutations that break framing on purpose: lengths that lie, padding, byte order, cuts, noise."""

from __future__ import annotations

from dataclasses import replace

from migstream.fuzzing.mutations.editing import Editing, misfit
from migstream.fuzzing.tree import Header, Raw, Record

__all__ = ["byte_order", "content_length", "cut", "length", "noise", "padding"]


def length(editing: Editing) -> str | None:
    """Let a record announce another length than its body has."""
    at = editing.pick(lambda node: isinstance(node, Record))
    if at is None:
        return None
    node = editing.nodes[at]
    assert isinstance(node, Record)
    size = 8 if node.layer == "xapi" else 4
    near = len(node.body) + editing.chance.choice((-8, -1, 1, 7, 8))
    new = max(near, 0) if editing.chance.randrange(2) else editing.number(size, node.length)
    if new == node.length:
        return None
    editing.nodes[at] = replace(node, length=new)
    return f"{editing.name(at)}: length {node.length} -> {new}, body of {len(node.body)} octets"


def content_length(editing: Editing) -> str | None:
    """Let an envelope's config be longer or shorter than its header says."""
    at = editing.pick(lambda node: isinstance(node, Header) and node.content)
    if at is None:
        return None
    node = editing.nodes[at]
    assert isinstance(node, Header)
    content, step = misfit(editing, node.content)
    editing.nodes[at] = replace(node, content=content)
    return f"{editing.name(at)}: config, but not its length: {step}"


def padding(editing: Editing) -> str | None:
    """Let padding be other than zero, too long or too short."""
    at = editing.pick(lambda node: isinstance(node, Record) and node.layer != "xapi")
    if at is None:
        return None
    node = editing.nodes[at]
    assert isinstance(node, Record)
    filled = editing.chance.randbytes(len(node.padding))
    new = editing.chance.choice((filled, filled, node.padding + bytes(1), node.padding[1:], bytes(8)))
    if new == node.padding:
        return None
    editing.nodes[at] = replace(node, padding=new)
    return f"{editing.name(at)}: padding {node.padding.hex() or 'none'} -> {new.hex() or 'none'}"


def byte_order(editing: Editing) -> str | None:
    """Write a record's header in the other byte order."""
    at = editing.pick(lambda node: isinstance(node, Record))
    if at is None:
        return None
    node = editing.nodes[at]
    assert isinstance(node, Record)
    editing.nodes[at] = replace(node, order="big" if node.order == "little" else "little")
    return f"{editing.name(at)}: header in the other byte order"


def cut(editing: Editing) -> str | None:
    """End the stream within a node, or behind it."""
    at = editing.anywhere()
    if at is None:
        return None
    octets = editing.nodes[at].build()
    keep = editing.chance.choice((0, len(octets), editing.chance.randrange(len(octets) + 1)))
    step = f"{editing.name(at)}: the stream ends after {keep} of its {len(octets)} octets"
    editing.nodes[at:] = [Raw("raw cut", octets[:keep])]
    return step


def noise(editing: Editing) -> str | None:
    """Damage the octets of a node, its header included."""
    at = editing.anywhere()
    if at is None:
        return None
    name = editing.name(at)
    octets, step = misfit(editing, editing.nodes[at].build())
    editing.nodes[at] = Raw("raw noise", octets)
    return f"{name}, with its header: {step}"
