"""migstream: Xen migration streams, read, checked, built and run.

::

    with migstream.open("guest.xl") as stream:
        for frame in stream:
            print(frame.offset, frame.layer.name, frame.type, frame.length)

Names are imported when first used, so ``import migstream`` costs next to nothing.
"""

from __future__ import annotations

from migstream._version import __version__ as __version__
