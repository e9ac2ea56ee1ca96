"""A process that wants to be tracked hands its userfaultfd over, so that nobody has to trace it for that.

In the process: `offer` (any program in any language can do the same: one octet with the descriptor). In
migstream: `accept`, or `fetch` from a socket at which the process listens; `track` and `ProcessSource` take
the descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct

from migstream.errors import GuestError
from migstream.guests.process import syscalls

__all__ = ["accept", "fetch", "offer"]

PR_SET_PTRACER = 0x5961_6D61  # linux/prctl.h
CREDENTIALS = struct.Struct("=3i")  # struct ucred: pid, uid, gid


def offer(channel: socket.socket) -> None:
    """Hand a userfaultfd of this process to the peer of ``channel``, a Unix socket; keep no copy.

    Where Yama restricts tracing to ancestors, the peer gets the right to trace this process too, which it
    needs to read its memory and to stop it. Raises `OSError`; ENOSYS where there is no userfaultfd.
    """
    peer, _, _ = CREDENTIALS.unpack(
        channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    )
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(peer), 0, 0, 0)  # fails where there is no Yama
    fd = syscalls.userfaultfd()
    try:
        socket.send_fds(channel, [b"U"], [fd])
    finally:
        os.close(fd)


def accept(channel: socket.socket) -> int:
    """Receive the userfaultfd that the peer of ``channel`` offers. Raises `GuestError` if it sends none."""
    try:
        message, fds, _, _ = socket.recv_fds(channel, 1, 1, socket.MSG_CMSG_CLOEXEC)
    except OSError as exc:
        raise GuestError(f"the process did not hand its userfaultfd over: {exc.strerror or exc}") from exc
    if not fds or not _is_userfaultfd(fds[0]):
        for fd in fds:
            os.close(fd)
        sent = "another descriptor" if fds else f"{message!r} without a descriptor" if message else "nothing"
        raise GuestError(f"the process should have handed its userfaultfd over, but sent {sent}")
    return fds[0]


def fetch(path: str) -> int:
    """Receive the userfaultfd that a process offers to whoever connects to the Unix socket ``path``."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        try:
            channel.connect(path)
        except OSError as exc:
            raise GuestError(f"{path!r}, where the process should hand its userfaultfd over: {exc}") from exc
        return accept(channel)


def _is_userfaultfd(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"
    return False
