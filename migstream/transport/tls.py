"""TLS with certificates of both sides: each end proves who it is, and checks the other.

Python's `ssl`, TLS 1.3 only. Both ends have a certificate, its key, and the authority that the *other*
end's certificate must come from. The sender also checks that the certificate is the destination's name's.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from typing import NoReturn

from migstream.errors import MigstreamError
from migstream.transport.errors import ConnectionLostError, TlsError

__all__ = ["TLS_HINT", "Tls", "explain", "load", "secured"]

TLS_HINT = "give --tls-cert, --tls-key and --tls-ca at both ends, or at none"


@dataclass(frozen=True)
class Tls:
    """What one end needs: PEM files of its certificate (chain), of its key, and of the authority it trusts.

    ``name`` is what the destination's certificate has to name; default: the host that is connected to.
    """

    certificate: str
    key: str
    authority: str
    name: str | None = None


#: Alerts of the other end, as OpenSSL names them -> what the other end does not like.
ALERTS = {
    "UNKNOWN_CA": "refuses our certificate: its --tls-ca is not the authority that --tls-cert comes from",
    "CERTIFICATE_REQUIRED": "wants a certificate of ours, and got none: give --tls-cert and --tls-key",
    "BAD_CERTIFICATE": "refuses our certificate (--tls-cert)",
    "UNSUPPORTED_CERTIFICATE": "refuses our certificate (--tls-cert): it is not for this end of a connection",
    "CERTIFICATE_EXPIRED": "refuses our certificate (--tls-cert): it has expired, or the clocks differ",
    "CERTIFICATE_REVOKED": "refuses our certificate (--tls-cert): it was revoked",
    "CERTIFICATE_UNKNOWN": "refuses our certificate (--tls-cert)",
    "DECRYPT_ERROR": "could not check our certificate's signature: does --tls-key belong to --tls-cert?",
    "PROTOCOL_VERSION": "does not speak TLS 1.3",
    "HANDSHAKE_FAILURE": "has no cipher in common with us",
}
_STRANGE = "it does not come from the authority in --tls-ca"
_MISNAMED = "if it is the right host, say what the certificate names by --tls-name"
#: OpenSSL's reasons to refuse a certificate (X509_V_ERR_*) -> what it means here.
REMEDIES = {
    9: "make a new one, or set the clocks right",  # not yet valid
    10: "make a new one, or set the clocks right",  # expired
    18: _STRANGE,
    19: _STRANGE,
    20: _STRANGE,
    21: _STRANGE,
    62: _MISNAMED,  # host
    64: _MISNAMED,  # address
}
#: Reasons for which OpenSSL gives up on octets that are no TLS.
NOT_TLS = {
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "HTTPS_PROXY_REQUEST",
    "UNKNOWN_PROTOCOL",
    "PACKET_LENGTH_TOO_LONG",
    "BAD_RECORD_TYPE",
    "RECORD_LAYER_FAILURE",
    "UNEXPECTED_MESSAGE",
}


def load(files: Tls, *, server: bool) -> ssl.SSLContext:
    """Return the context of an end: ``server`` for who listens. Raises `TlsError`, which names the file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    if server:
        context.num_tickets = 0  # nobody comes back to a session; and the sender reads nothing but messages
    for option, path in (
        ("--tls-cert", files.certificate),
        ("--tls-key", files.key),
        ("--tls-ca", files.authority),
    ):
        try:
            with open(path, "rb"):
                pass
        except OSError as exc:
            raise TlsError(f"{option} {path}: {exc.strerror}") from None
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_password)
    except ssl.SSLError as exc:
        mismatch = exc.reason == "KEY_VALUES_MISMATCH"
        trouble = "is not the key of" if mismatch else "and the certificate are not both PEM:"
        raise TlsError(f"--tls-key {files.key} {trouble} --tls-cert {files.certificate}") from None
    try:
        context.load_verify_locations(files.authority)
    except ssl.SSLError:
        raise TlsError(f"--tls-ca {files.authority} holds no certificate in PEM form") from None
    return context


def _no_password() -> NoReturn:
    raise TlsError("the key of --tls-key is encrypted; give one without a password, readable by you alone")


def secured(
    sock: socket.socket, context: ssl.SSLContext, peer: str, *, server: bool, name: str | None = None
) -> ssl.SSLSocket:
    """Shake hands over ``sock``, which has its time limit, and return what to talk through.

    Raises `TlsError`, which says whose certificate was refused and why, and `ConnectionLostError`. The
    sender may learn only from its first message that the receiver refuses *its* certificate.
    """
    try:
        return context.wrap_socket(sock, server_side=server, server_hostname=name)
    except ssl.SSLEOFError:
        raise ConnectionLostError(f"{peer} ended the TLS hand-shake; its own message says why") from None
    except ssl.SSLError as exc:
        raise explain(exc, peer) from exc
    except TimeoutError:
        raise ConnectionLostError(
            f"{peer} did not take part in the TLS hand-shake: is it migstream?"
        ) from None
    except OSError as exc:
        raise ConnectionLostError(f"{peer} ended the TLS hand-shake: {exc.strerror or exc}") from exc


def explain(error: ssl.SSLError, peer: str) -> MigstreamError:
    """Return what an error of OpenSSL means to a user."""
    reason = error.reason or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        remedy = REMEDIES.get(error.verify_code)
        hint = f"; {remedy}" if remedy else ""
        return TlsError(f"the certificate of {peer} is refused: {error.verify_message.rstrip('.')}{hint}")
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return TlsError(f"{peer} has no certificate: it needs --tls-cert and --tls-key")
    if reason in NOT_TLS:
        return TlsError(f"{peer} does not speak TLS, and this end does: {TLS_HINT}")
    for alert, meaning in ALERTS.items():
        if reason.endswith(f"ALERT_{alert}"):
            return TlsError(f"{peer} {meaning}")
    return TlsError(f"TLS with {peer} failed: {reason.replace('_', ' ').lower()}")
