"""Damaged streams: the mutator's table, driven by Hypothesis, so that damage shrinks too."""

from __future__ import annotations

import hypothesis.strategies as st

from migstream.fuzzing.mutations import MUTATIONS, Editing
from migstream.fuzzing.tree import Node, Raw, Tree
from migstream.testing.octets import StreamOctets

__all__ = ["damaged"]

MAX_STEPS = 3


@st.composite
def damaged(draw: st.DrawFn, source: st.SearchStrategy[bytes], *, max_steps: int = MAX_STEPS) -> StreamOctets:
    """Draw a stream of ``source`` and mutate it, in one to ``max_steps`` steps.

    A mutation may leave a stream sound (an optional record more, say): what it is now is for verify to
    tell. The steps are in the falsifying example.
    """
    tree = Tree.parse(draw(source))
    chance = draw(st.randoms(use_true_random=False))

    def other() -> list[Node]:
        return Tree.parse(draw(source)).nodes

    editing = Editing(tree.nodes, chance, other)
    steps = []
    for mutation in draw(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=max_steps)):
        step = mutation.apply(editing)
        if step is not None:
            steps.append(f"{mutation.name}: {step}")
    if not steps:
        tree.nodes.append(Raw("raw noise", b"\xff"))
        steps.append("an octet 0xff put in at the end")
    return StreamOctets(tree.build(), steps)
