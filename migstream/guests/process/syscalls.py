"""System calls that the standard library has no name for, and what a process's end looks like to them."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from typing import TYPE_CHECKING

from migstream.errors import GuestError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["USERFAULTFD", "USER_MODE_ONLY", "gone", "pidfd_getfd", "process_vm_readv", "userfaultfd"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.process_vm_readv.restype = ctypes.c_ssize_t

#: userfaultfd's number by machine (asm/unistd_64.h, asm-generic/unistd.h).
USERFAULTFD = {"x86_64": 323, "aarch64": 282}
PIDFD_GETFD = 438  # on every machine
USER_MODE_ONLY = 1  # linux/userfaultfd.h: needs no privileges; writes by the kernel are seen all the same

#: What the kernel answers about a process that has ended.
_ENDED = (errno.ESRCH, errno.ENOENT)


def userfaultfd(flags: int = os.O_CLOEXEC | USER_MODE_ONLY) -> int:
    """Open a userfaultfd of this process's memory. Raises `OSError`; ENOSYS where there is no such call."""
    number = USERFAULTFD.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"userfaultfd's number on {platform.machine()} is not known")
    return _syscall(number, flags)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """Return a copy of descriptor ``fd`` of the process behind ``pidfd``. Raises `OSError`."""
    return _syscall(PIDFD_GETFD, pidfd, fd, 0)


def process_vm_readv(pid: int, into: npt.NDArray[np.uint64], remote: npt.NDArray[np.uint64]) -> int:
    """Read memory of ``pid``; return how many octets came before the first that could not be read.

    ``into`` and ``remote`` are uint64[n, 2], contiguous: address and length of each piece, here and there;
    at most IOV_MAX of each. Raises `OSError` if nothing could be read.
    """
    done = _libc.process_vm_readv(
        ctypes.c_int(pid),
        ctypes.c_void_p(into.ctypes.data),
        ctypes.c_ulong(len(into)),
        ctypes.c_void_p(remote.ctypes.data),
        ctypes.c_ulong(len(remote)),
        ctypes.c_ulong(0),
    )
    return _checked(int(done))


def gone(pid: int, exc: OSError) -> GuestError | None:
    """Return the error to raise if ``exc`` says that process ``pid`` has ended."""
    if exc.errno in _ENDED:
        return GuestError(f"process {pid} has ended, or there never was one; nothing of it can be saved")
    return None


def _syscall(number: int, *arguments: int) -> int:
    return _checked(int(_libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))))


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
