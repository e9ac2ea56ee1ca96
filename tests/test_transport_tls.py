"""TLS: both ends show a certificate and check the other's; who is refused is told why, at both ends.

The certificates are made by the recipe in docs/migrating.md, as it stands there.
"""

from __future__ import annotations

import shutil
import ssl
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from migstream.errors import MigstreamError
from migstream.guests.compare import content_equal
from migstream.guests.model import ModelGuest
from migstream.transport.address import UnixAddress
from migstream.transport.errors import RemoteError, TlsError
from migstream.transport.messages import GuestState
from migstream.transport.send import SendResult
from migstream.transport.tls import Tls, load
from tests.transport import StartingGuest, attempt, connected, receiving, wire

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
PAGES = 300

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="the openssl command is not installed"
)


def run_recipe(directory: Path, *, authority: str = "migration-ca") -> None:
    """Run the page's recipe in ``directory``, for hosts that are both this one."""
    recipe = PAGE.read_text().partition("```sh\n")[2].partition("```")[0]
    names = "authority=migration-ca source=source.example destination=destination.example\n"
    assert recipe.startswith(names)
    ours = f"authority={authority} source=source destination=localhost\n"
    subprocess.run(
        ["sh", "-euc", recipe.replace(names, ours)], cwd=directory, check=True, capture_output=True
    )


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    run_recipe(directory)
    return directory


@pytest.fixture(scope="module")
def strange_pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("strange-pki")
    run_recipe(directory, authority="strange-ca")
    return directory


def of(directory: Path, host: str, *, authority: Path | None = None) -> Tls:
    """Return the files of ``host``; where no authority is given, the one in the same directory."""
    ca = authority or next(directory.glob("*-ca.pem"))
    return Tls(str(directory / f"{host}.pem"), str(directory / f"{host}.key"), str(ca), "localhost")


@pytest.fixture
def source() -> ModelGuest:
    return ModelGuest.booted(PAGES)


@pytest.fixture
def target() -> StartingGuest:
    return StartingGuest.empty(PAGES)


def test_the_recipe_leaves_what_the_page_says(pki: Path) -> None:
    names = {path.name for path in pki.iterdir()}
    hosts = ("source", "localhost", "migration-ca")
    assert names - {"migration-ca.srl"} == {f"{host}.{end}" for host in hosts for end in ("pem", "key")}


@pytest.mark.parametrize("options", [{}, {"level": 1}, {"checksum": True}, {"level": 1, "checksum": True}])
@pytest.mark.parametrize("place", ["tcp", "unix"])
def test_a_guest_arrives_over_tls(
    options: dict[str, object],
    place: str,
    pki: Path,
    tmp_path: Path,
    source: ModelGuest,
    target: StartingGuest,
) -> None:
    context = load(of(pki, "localhost"), server=True)
    where = {"address": UnixAddress(str(tmp_path / "x"))} if place == "unix" else {}
    with receiving(target, context=context, **where) as receiver:  # type: ignore[arg-type]  # one keyword
        result = attempt(source, receiver.address, tls=of(pki, "source"), **options)
    assert isinstance(result, SendResult), result
    assert result.state is GuestState.RUNNING
    assert content_equal(source, target)


def test_pages_do_not_go_over_the_wire_in_the_clear(pki: Path, target: StartingGuest) -> None:
    """An octet that is damaged below TLS ends the connection, though no checksum was asked for."""
    source = ModelGuest.booted(PAGES)
    with (
        receiving(target, context=load(of(pki, "localhost"), server=True)) as receiver,
        wire(receiver.address, damage=200_000) as through,
    ):
        outcome = attempt(source, through, tls=of(pki, "source"))
    assert isinstance(outcome, MigstreamError)
    assert (source.suspended, target.started) == (False, False)
    assert isinstance(receiver.error, TlsError)


def test_the_receivers_reason_comes_through_tls(pki: Path, target: StartingGuest) -> None:
    source = ModelGuest.booted(8192)
    with receiving(target, context=load(of(pki, "localhost"), server=True)) as receiver:
        outcome = attempt(source, receiver.address, tls=of(pki, "source"))
    assert isinstance(outcome, RemoteError)
    assert "is above the target's highest" in str(outcome)
    assert not source.suspended


def refused(
    source: ModelGuest,
    target: StartingGuest,
    here: Tls | None,
    there: Tls | None,
    *,
    rescue: Tls | None,
) -> tuple[MigstreamError, str]:
    """Return what the sender raises and what the receiver tells; ``rescue`` then gets a migration through."""
    context = None if there is None else load(there, server=True)
    with receiving(target, context=context) as receiver:
        outcome = attempt(source, receiver.address, tls=here)
        assert not source.suspended
        assert receiver.error is None
        attempt(source, receiver.address, tls=rescue)
    assert content_equal(source, target)
    assert isinstance(outcome, MigstreamError)
    return outcome, " ".join(receiver.ignored)


def test_a_sender_of_a_strange_authority_is_refused(
    pki: Path, strange_pki: Path, source: ModelGuest, target: StartingGuest
) -> None:
    stranger = of(strange_pki, "source", authority=pki / "migration-ca.pem")
    error, told = refused(source, target, stranger, of(pki, "localhost"), rescue=of(pki, "source"))
    assert isinstance(error, TlsError)
    assert "refuses our certificate: its --tls-ca is not the authority that --tls-cert comes from" in str(
        error
    )
    assert "the certificate of the sender at" in told
    assert "is refused: unable to get local issuer certificate; it does not come from" in told


def test_a_receiver_of_a_strange_authority_is_refused(
    pki: Path, strange_pki: Path, source: ModelGuest, target: StartingGuest
) -> None:
    there = of(pki, "localhost", authority=None)
    misled = of(pki, "source", authority=strange_pki / "strange-ca.pem")
    error, told = refused(source, target, misled, there, rescue=of(pki, "source"))
    assert "the certificate of the destination at" in str(error)
    assert "it does not come from the authority in --tls-ca" in str(error)
    assert "refuses our certificate: its --tls-ca is not the authority" in told


def test_a_certificate_of_another_host_is_refused(
    pki: Path, source: ModelGuest, target: StartingGuest
) -> None:
    misled = replace(of(pki, "source"), name="other.example")
    error, told = refused(source, target, misled, of(pki, "localhost"), rescue=of(pki, "source"))
    assert "Hostname mismatch, certificate is not valid for 'other.example'" in str(error)
    assert "refuses our certificate" in told


def test_the_host_of_the_address_is_what_the_certificate_has_to_name(
    pki: Path, source: ModelGuest, target: StartingGuest
) -> None:
    by_number = replace(of(pki, "source"), name=None)  # 127.0.0.1, where the certificate has localhost
    error, _ = refused(source, target, by_number, of(pki, "localhost"), rescue=of(pki, "source"))
    assert "IP address mismatch" in str(error)


def test_a_sender_without_tls_is_told_that_it_is_wanted(
    pki: Path, source: ModelGuest, target: StartingGuest
) -> None:
    error, told = refused(source, target, None, of(pki, "localhost"), rescue=of(pki, "source"))
    assert isinstance(error, RemoteError)
    assert "refuses: TLS is wanted here: give --tls-cert, --tls-key and --tls-ca at both ends" in str(error)
    assert "TLS is wanted here" in told


def test_a_sender_with_tls_is_told_that_the_receiver_has_none(
    pki: Path, source: ModelGuest, target: StartingGuest
) -> None:
    error, told = refused(source, target, of(pki, "source"), None, rescue=None)
    assert isinstance(error, TlsError)
    assert "does not speak TLS, and this end does: give --tls-cert" in str(error)
    assert "speaks TLS, and this end does not: give --tls-cert" in told


def test_a_caller_without_a_certificate_is_refused(
    pki: Path, source: ModelGuest, target: StartingGuest
) -> None:
    context = ssl.create_default_context(cafile=str(pki / "migration-ca.pem"))
    with receiving(target, context=load(of(pki, "localhost"), server=True)) as receiver:
        sock = connected(receiver.address)
        with (
            pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
            context.wrap_socket(sock, server_hostname="localhost") as tls,
        ):
            tls.recv(1)
        attempt(source, receiver.address, tls=of(pki, "source"))
    assert "has no certificate: it needs --tls-cert and --tls-key" in receiver.ignored[0]
    assert content_equal(source, target)


def test_tls_older_than_1_3_is_refused(pki: Path, source: ModelGuest, target: StartingGuest) -> None:
    context = ssl.create_default_context(cafile=str(pki / "migration-ca.pem"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with receiving(target, context=load(of(pki, "localhost"), server=True)) as receiver:
        sock = connected(receiver.address)
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            context.wrap_socket(sock, server_hostname="localhost")
        attempt(source, receiver.address, tls=of(pki, "source"))
    assert "unsupported protocol" in receiver.ignored[0]


def test_a_unix_socket_needs_a_name_to_check(pki: Path, source: ModelGuest) -> None:
    nameless = replace(of(pki, "source"), name=None)
    assert "give --tls-name" in str(attempt(source, UnixAddress("/nowhere"), tls=nameless))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        ({"certificate": "absent.pem"}, "--tls-cert absent.pem: No such file or directory"),
        ({"key": "absent.key"}, "--tls-key absent.key: No such file or directory"),
        ({"authority": "."}, "--tls-ca .: Is a directory"),
        ({"key": "localhost.key"}, "--tls-key localhost.key is not the key of --tls-cert source.pem"),
        ({"certificate": "source.key"}, "and the certificate are not both PEM: --tls-cert source.key"),
        ({"authority": "source.key"}, "--tls-ca source.key holds no certificate in PEM form"),
        ({"key": "locked.key"}, "the key of --tls-key is encrypted"),
    ],
)
@pytest.mark.parametrize("server", [False, True])
def test_a_file_that_cannot_be_used_is_named(
    pki: Path, monkeypatch: pytest.MonkeyPatch, spoil: dict[str, str], complaint: str, server: bool
) -> None:
    monkeypatch.chdir(pki)
    if "locked.key" in spoil.values():
        subprocess.run(
            ["openssl", "ec", "-in", "source.key", "-out", "locked.key", "-aes128", "-passout", "pass:x"],
            check=True,
            capture_output=True,
        )
    files = replace(Tls("source.pem", "source.key", "migration-ca.pem"), **spoil)
    with pytest.raises(TlsError) as raised:
        load(files, server=server)
    assert complaint in str(raised.value)
    Path("locked.key").unlink(missing_ok=True)
