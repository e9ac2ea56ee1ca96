"""Mutations of a stream's plan: splices, checkpoints, ends, and what has to stand before what."""

from __future__ import annotations

from collections.abc import Collection

from migstream.fuzzing.mutations.editing import Editing
from migstream.fuzzing.tree import Header, Node, Record
from migstream.layout import TABLE, Phase
from migstream.records import libxc, libxl

__all__ = [
    "add_checkpoint",
    "another_header",
    "drop_checkpoint",
    "late_static_data",
    "move_checkpoint",
    "second_end",
    "splice",
    "state_first",
]

_STATIC = frozenset(place.record.code for place in TABLE.values() if place.phase is Phase.STATIC)
_STATE = frozenset(place.record.code for place in TABLE.values() if place.phase is Phase.STATE)
_PAGES = libxc.PageData.code


def _is(node: Node, layer: str, *codes: int) -> bool:
    return isinstance(node, Record) and node.layer == layer and node.code in codes


def splice(editing: Editing) -> str | None:
    """Go on with another stream's end, where it has the same kind of node, or anywhere."""
    other = editing.other()
    if not editing.nodes or not other:
        return None
    at = editing.chance.randrange(len(editing.nodes))
    label = editing.nodes[at].label
    alike = [i for i, node in enumerate(other) if node.label == label]
    start = editing.chance.choice(alike) if alike else editing.chance.randrange(len(other))
    editing.nodes[at:] = other[start:]
    return f"{editing.name(at)}: from here on another stream, from its node {start}"


def second_end(editing: Editing) -> str | None:
    """Put in an END, of libxc or libxl, beside some record."""
    at = editing.pick(lambda node: isinstance(node, Record))
    if at is None:
        return None
    node = editing.nodes[at]
    layer = editing.chance.choice(("libxc", "libxl"))
    editing.nodes.insert(at, Record.of(layer, libxc.End.code, b"", node.order))
    return f"{editing.name(at)}: an END more"


def add_checkpoint(editing: Editing) -> str | None:
    """Put in a checkpoint: libxc's record, libxl's, or both."""
    at = editing.pick(lambda node: isinstance(node, Record) and node.layer == "libxc")
    if at is None:
        return None
    order = editing.nodes[at].order
    both = [
        Record.of("libxc", libxc.Checkpoint.code, b"", order),
        Record.of("libxl", libxl.CheckpointEnd.code, b"", order),
    ]
    way = editing.chance.randrange(4)
    added = both[:1] if way == 0 else both[1:] if way == 1 else both
    editing.nodes[at:at] = added
    return f"node {at}: {' and '.join(node.label for node in added)} put in"


def _checkpoint(editing: Editing) -> int | None:
    return editing.pick(
        lambda node: (
            _is(node, "libxc", libxc.Checkpoint.code)
            or _is(node, "libxl", libxl.CheckpointEnd.code, libxl.CheckpointState.code)
        )
    )


def drop_checkpoint(editing: Editing) -> str | None:
    """Take a record of a checkpoint out."""
    at = _checkpoint(editing)
    if at is None:
        return None
    step = f"{editing.name(at)}: dropped"
    del editing.nodes[at]
    return step


def move_checkpoint(editing: Editing) -> str | None:
    """Put a record of a checkpoint somewhere else."""
    at = _checkpoint(editing)
    if at is None:
        return None
    node = editing.nodes.pop(at)
    to = editing.chance.randrange(len(editing.nodes) + 1)
    editing.nodes.insert(to, node)
    return f"{editing.name(to)}: was node {at}"


def _move_across_pages(editing: Editing, codes: Collection[int], *, behind: bool) -> str | None:
    at = editing.pick(lambda node: _is(node, "libxc", *codes))
    pages = editing.places(lambda node: _is(node, "libxc", _PAGES))
    if at is None or not pages:
        return None
    to = editing.chance.choice(pages)
    node = editing.nodes.pop(at)
    to = max(to - (at < to) + behind, 0)
    editing.nodes.insert(to, node)
    return f"{editing.name(to)}: was node {at}, now {'behind' if behind else 'before'} pages"


def late_static_data(editing: Editing) -> str | None:
    """Put static data behind pages."""
    return _move_across_pages(editing, _STATIC, behind=True)


def state_first(editing: Editing) -> str | None:
    """Put state before pages."""
    return _move_across_pages(editing, _STATE, behind=False)


def another_header(editing: Editing) -> str | None:
    """Put another stream's headers in front, or in place of, this one's: envelope, guest type, byte order."""
    mine = editing.places(lambda node: isinstance(node, Header))
    theirs = [node for node in editing.other() if isinstance(node, Header)]
    if not mine or not theirs:
        return None
    at, node = editing.chance.choice(mine), editing.chance.choice(theirs)
    instead = editing.chance.randrange(2)
    editing.nodes[at : at + instead] = [node]
    return f"{editing.name(at)}: another stream's, {'instead' if instead else 'put in'}"
