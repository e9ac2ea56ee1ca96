"""Where a command writes a stream to: a file that appears when it is complete, or a descriptor."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["new_file"]


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[int]:
    """Open a descriptor whose octets become the file ``path`` when the block ends without an error.

    They are written beside it, under a name that starts with a dot, and brought to the disk before the
    file is renamed. On any error, an interrupt too, nothing is left and what had the name is untouched.
    A pipe or a device is written to as it is.
    """
    target = Path(path).resolve()
    with contextlib.suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{target} is a directory")
        if not stat.S_ISREG(mode):
            fd = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
            try:
                yield fd
            finally:
                os.close(fd)
            return
    fd, aside = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    try:
        yield fd
        os.fchmod(fd, 0o666 & ~_umask())
        os.fsync(fd)
        Path(aside).rename(target)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
