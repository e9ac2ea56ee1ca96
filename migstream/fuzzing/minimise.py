"""A smaller stream with the same finding: nodes are dropped, then what is left is made small.

Records are what a stream is made of, so they are what is left out, by delta debugging over the nodes of its
tree (Zeller and Hildebrandt, *Simplifying and isolating failure-inducing input*, 2002). Then each node is
shrunk: its content, its body, the entries that it counts, its fields, whose lengths are made to fit where
the finding survives that. A stream only becomes shorter, or keeps its length with smaller values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from migstream.fuzzing.tree import Header, Node, Raw, Record, Tree
from migstream.records import ByteOrder
from migstream.records.page_types import TYPE_SHIFT, PageType

__all__ = ["Minimised", "minimise"]

EXECUTIONS = 200  # of the target, at most, for one finding
WORDS = 4  # of eight octets each, behind a body's declared fields, whose values are made small
PAGE = 4096
_WITHOUT_DATA = frozenset(kind for kind in PageType if not kind.has_data)


@dataclass(frozen=True)
class Minimised:
    """The smallest stream that was found. ``complete``: nothing smaller was left to try."""

    octets: bytes
    executions: int
    complete: bool


class _SpentError(Exception):
    """No execution is left."""


def minimise(
    octets: bytes,
    keeps: Callable[[bytes], bool],
    *,
    executions: int = EXECUTIONS,
    progress: Callable[[int, int], None] | None = None,
) -> Minimised:
    """Return the smallest stream found for which ``keeps`` holds, as it has to for ``octets``.

    ``keeps`` is called at most ``executions`` times, and never twice with the same stream;
    ``progress`` hears of the calls made and of the octets that are left.
    """
    search = _Search(octets, keeps, executions, progress)
    try:
        search.run()
    except _SpentError:
        return Minimised(search.best, search.executions, False)
    return Minimised(search.best, search.executions, True)


class _Search:
    def __init__(
        self,
        octets: bytes,
        keeps: Callable[[bytes], bool],
        limit: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.best = octets
        self.nodes: list[Node] = Tree.parse(octets).nodes
        self.executions = 0
        self._keeps = keeps
        self._limit = limit
        self._progress = progress
        self._tried = {_digest(octets)}

    def run(self) -> None:
        before = None
        while before != self.best:
            before = self.best
            self._drop_nodes()
            for index in range(len(self.nodes)):
                self._shrink_node(index)

    def _accept(self, nodes: list[Node]) -> bool:
        """Try these nodes; where the finding survives, they are the best from here on."""
        octets = Tree(nodes).build()
        digest = _digest(octets)
        if len(octets) > len(self.best) or digest in self._tried:
            return False
        if self.executions == self._limit:
            raise _SpentError
        self._tried.add(digest)
        self.executions += 1
        kept = self._keeps(octets)
        if kept:
            self.best, self.nodes = octets, nodes
        if self._progress is not None:
            self._progress(self.executions, len(self.best))
        return kept

    def _drop_nodes(self) -> None:
        parts = min(2, len(self.nodes))
        while parts:
            size = -(-len(self.nodes) // parts)
            for start in range(0, len(self.nodes), size):
                if self._accept(self.nodes[:start] + self.nodes[start + size :]):
                    parts = max(parts - 1, 2)
                    break
            else:
                if parts >= len(self.nodes):
                    return
                parts = 2 * parts
            parts = min(parts, len(self.nodes))

    def _shrink_node(self, index: int) -> None:
        for shrinker in _SHRINKERS:
            shrunk = True
            while shrunk:
                shrunk = any(self._replace(index, node) for node in shrinker(self.nodes[index]))

    def _replace(self, index: int, node: Node) -> bool:
        return self._accept([*self.nodes[:index], node, *self.nodes[index + 1 :]])


def _digest(octets: bytes) -> bytes:
    return hashlib.sha256(octets).digest()


# Each yields smaller forms of a node, the boldest first; one that survives is where the next round begins.


def _fitted(node: Node) -> Iterator[Node]:
    """Give the record its honest length, and padding of zeros."""
    if isinstance(node, Record):
        yield node.with_body(node.body)


def _without_content(node: Node) -> Iterator[Node]:
    if isinstance(node, Header) and node.content:
        for length in _lengths(len(node.content)):
            yield node.with_content(node.content[:length])


def _fewer_entries(node: Node) -> Iterator[Node]:
    """Drop some of what a body counts, PAGE_DATA's pages with them, and correct the count."""
    counted = _counted(node)
    if counted is None or not isinstance(node, Record):
        return
    at, entry_size, start = counted
    count = int.from_bytes(node.body[at : at + 4], node.order)
    present = min(count, max(0, len(node.body) - start) // entry_size)
    behind = start + present * entry_size
    entries = [node.body[i : i + entry_size] for i in range(start, behind, entry_size)]
    for left in _lengths(present):
        for kept in (entries[:left], entries[present - left :]):
            rest = node.body[behind:]
            if node.label == "libxc PAGE_DATA":
                rest = rest[: PAGE * sum(_has_data(entry, node.order) for entry in kept)]
            head = node.body[:at] + left.to_bytes(4, node.order) + node.body[at + 4 : start]
            yield node.with_body(head + b"".join(kept) + rest)


def _has_data(entry: bytes, order: ByteOrder) -> bool:
    """Tell whether a page comes for an entry of PAGE_DATA: reserved types are taken to have one."""
    return int.from_bytes(entry, order) >> TYPE_SHIFT not in _WITHOUT_DATA


def _counted(node: Node) -> tuple[int, int, int] | None:
    """Return where a node's count is, an entry's size, and where its entries start; ``None`` without."""
    if node.declared is None:
        return None
    for wire in node.declared.wire_fields:
        if wire.kind == "array" and wire.counted_by:
            return node.declared.offset_of(wire.counted_by), wire.size, node.declared.head_size
    return None


def _shorter(node: Node) -> Iterator[Node]:
    """Cut the body, with a length that fits, or with the one that it claims."""
    if isinstance(node, Header):
        return
    for length in _lengths(len(node.body)):
        yield node.with_body(node.body[:length])
        if isinstance(node, Record) and node.length != len(node.body):
            yield replace(node, body=node.body[:length])
    if isinstance(node, Raw):
        for length in _lengths(len(node.body)):
            yield node.with_body(node.body[len(node.body) - length :])


def _zeroed(node: Node) -> Iterator[Node]:
    """Put zeros behind the declared fields: into pages and contexts, mostly."""
    head = 0 if node.declared is None else node.declared.head_size
    for start in (0, head, head + 8 * WORDS):
        if any(node.body[start:]):
            yield replace(node, body=node.body[:start] + bytes(len(node.body) - start))


def _smaller_values(node: Node) -> Iterator[Node]:
    for start, size in _fields(node):
        value = int.from_bytes(node.body[start : start + size], node.order)
        for smaller in (0, 1, value >> 32 << 32, value >> 16, value >> 1):
            if smaller >= value:
                continue
            octets = smaller.to_bytes(size, node.order)
            yield replace(node, body=node.body[:start] + octets + node.body[start + size :])


def _smaller_length(node: Node) -> Iterator[Node]:
    """Tell a smaller lie, where the length has to lie."""
    if isinstance(node, Record) and node.length != len(node.body):
        for smaller in (len(node.body) + 1, node.length >> 16, node.length >> 1):
            if 0 <= smaller < node.length:
                yield replace(node, length=smaller)


def _fields(node: Node) -> Iterator[tuple[int, int]]:
    """Yield start and size of what is taken for integers: declared fields, and words behind them."""
    at = 0
    for wire in node.declared.wire_fields if node.declared is not None else ():
        if wire.kind == "int" and at + wire.size <= len(node.body):
            yield at, wire.size
        if wire.variable:
            break
        at += wire.size
    for start in range(at, min(len(node.body) - 7, at + 8 * WORDS), 8):
        yield start, 8


def _lengths(length: int) -> Sequence[int]:
    """Return lengths below ``length`` to try: 0, then ever closer to it."""
    tries, step = [0] if length > 0 else [], length // 2
    while step > 0:
        tries.append(length - step)
        step //= 2
    return list(dict.fromkeys(tries))


_SHRINKERS: tuple[Callable[[Node], Iterator[Node]], ...] = (
    _fitted,
    _without_content,
    _fewer_entries,
    _shorter,
    _zeroed,
    _smaller_values,
    _smaller_length,
)
