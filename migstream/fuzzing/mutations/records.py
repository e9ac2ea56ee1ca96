"""Mutations of whole records: twice, gone, elsewhere, of another type, from another stream."""

from __future__ import annotations

from functools import cache

from migstream.fuzzing.mutations.editing import Editing
from migstream.fuzzing.tree import Node, Record
from migstream.records import OPTIONAL, record_name, record_types

__all__ = ["drop", "duplicate", "foreign", "made", "move", "retype", "swap", "unknown"]

UNKNOWN = (0x13, 0x14, 0x7F, 0xFFFF, 0x7FFF_FFFF)  # types that no specification has


def _is_record(node: Node) -> bool:
    return isinstance(node, Record)


@cache
def _codes(layer: str) -> tuple[int, ...]:
    return tuple(cls.code for cls in record_types(layer))


def drop(editing: Editing) -> str | None:
    """Take a node out."""
    at = editing.anywhere()
    if at is None:
        return None
    step = f"{editing.name(at)}: dropped"
    del editing.nodes[at]
    return step


def duplicate(editing: Editing) -> str | None:
    """Let a node occur again, at once or later."""
    at = editing.anywhere()
    if at is None:
        return None
    to = at + 1 if editing.chance.randrange(2) else editing.chance.randrange(len(editing.nodes) + 1)
    editing.nodes.insert(to, editing.nodes[at])
    return f"{editing.name(to)}: repeats node {at + (to <= at)}"


def move(editing: Editing) -> str | None:
    """Put a node somewhere else."""
    at = editing.anywhere()
    if at is None:
        return None
    node = editing.nodes.pop(at)
    to = editing.chance.randrange(len(editing.nodes) + 1)
    editing.nodes.insert(to, node)
    return f"{editing.name(to)}: was node {at}"


def swap(editing: Editing) -> str | None:
    """Exchange two records that follow each other."""
    at = editing.pick(_is_record)
    if at is None or at + 1 >= len(editing.nodes):
        return None
    nodes = editing.nodes
    nodes[at], nodes[at + 1] = nodes[at + 1], nodes[at]
    return f"{editing.name(at)}: was behind node {at + 1} ({nodes[at + 1].label})"


def foreign(editing: Editing) -> str | None:
    """Put in a record of another stream of the corpus: another guest type, layer or byte order."""
    others = [node for node in editing.other() if isinstance(node, Record)]
    if not others:
        return None
    node = editing.chance.choice(others)
    at = editing.chance.randrange(len(editing.nodes) + 1)
    editing.nodes.insert(at, node)
    return f"{editing.name(at)}: from another stream"


def _new(editing: Editing, code: int | None, doing: str) -> str | None:
    """Put in an empty or zeroed record where one of the same layer stands."""
    at = editing.pick(_is_record)
    if at is None:
        return None
    beside = editing.nodes[at]
    layer = "libxc" if beside.layer == "xapi" and code is not None else beside.layer
    code = editing.chance.choice(_codes(layer)) if code is None else code
    body = bytes(editing.chance.choice((0, 0, 4, 8, 16, 24, 64)))
    editing.nodes.insert(at, Record.of(layer, code, body, beside.order))
    return f"{editing.name(at)}: {doing}, {len(body)} octets"


def made(editing: Editing) -> str | None:
    """Put in a new record of a type that the layer has, its body zeros."""
    return _new(editing, None, "made")


def unknown(editing: Editing) -> str | None:
    """Put in a record of a type that nobody knows, mandatory or optional."""
    code = editing.chance.choice(UNKNOWN) | editing.chance.choice((0, OPTIONAL))
    return _new(editing, code, "unknown")


def retype(editing: Editing) -> str | None:
    """Give a record another type of its layer, or an unknown one; its body stays."""
    at = editing.pick(_is_record)
    if at is None:
        return None
    node = editing.nodes[at]
    assert isinstance(node, Record)
    code = editing.chance.choice((*_codes(node.layer), editing.chance.choice(UNKNOWN), node.code ^ OPTIONAL))
    step = f"{editing.name(at)}: now {record_name(node.layer, code)}"
    editing.nodes[at] = Record(node.layer, node.order, code, node.length, node.body, node.padding)
    return step
