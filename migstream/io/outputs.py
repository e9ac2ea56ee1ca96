"""Where a command writes a stream to: a file that appears when it is complete, or a descriptor."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["new_file"]


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[int]:
    """Open a descriptor whose octets become the file ``path`` when the block ends without an error.

    They are written beside it, under a name that starts with a dot, and renamed then. On any error, an
    interrupt too, nothing is left and what had the name is untouched. ``durable``: they are on the disk
    before the file has its name, which what cannot be made again (a guest that is gone) is worth waiting
    for. A pipe or a device is written to as it is.
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
    # The name is known before the file is there: an interrupt in between leaves nothing either.
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    fd = -1
    try:
        try:
            fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, os.fspath(path)) from None  # the name that was asked for
        yield fd
        if durable:
            os.fsync(fd)
        aside.rename(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    finally:
        if fd >= 0:
            os.close(fd)
