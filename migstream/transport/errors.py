"""What goes wrong between two hosts. Damage to the stream itself is a `StreamError`, as everywhere."""

from __future__ import annotations

from migstream.errors import MigstreamError, UnsettledError

__all__ = ["AddressError", "ConnectionLostError", "HandoverError", "ProtocolError", "RemoteError", "TlsError"]


class AddressError(MigstreamError):
    """A string that should name a place to connect to does not; the message has one that does."""


class ConnectionLostError(MigstreamError):
    """The connection could not be made, or ended too early."""


class ProtocolError(MigstreamError):
    """The other end says what does not belong here: it is no migstream, or of another version."""


class RemoteError(MigstreamError):
    """The other end refused the migration, or failed; the message has its reason."""


class TlsError(MigstreamError):
    """TLS could not be set up: a certificate was refused, or a file cannot be used."""


class HandoverError(UnsettledError):
    """The connection broke behind GO: the guest stays suspended at the source."""
