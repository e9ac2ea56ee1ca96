"""Migrations between hosts: the guest arrives whole, or runs on at the source; it never runs twice."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migstream.engines.policies import Decision, PrecopyStats, max_iterations
from migstream.engines.restore import RestoreResult, restore
from migstream.errors import DeadlineError, GuestError, MigstreamError, StreamError, UnsettledError
from migstream.guests.compare import content_equal
from migstream.guests.model import ModelGuest
from migstream.guests.protocols import RestoreTarget
from migstream.guests.workload import Workload
from migstream.records.libxc import GuestType
from migstream.transport import receive as receive_module
from migstream.transport.address import Address, TcpAddress, UnixAddress, listen, parse_address
from migstream.transport.errors import (
    AddressError,
    ConnectionLostError,
    HandoverError,
    ProtocolError,
    RemoteError,
)
from migstream.transport.link import Link
from migstream.transport.messages import Accept, Failed, Go, GuestState, Loaded, Offer, Refuse, Running
from migstream.transport.send import SendResult
from tests.transport import JOIN_S, LOOPBACK, StartingGuest, attempt, connected, receiving, sending, wire

PAGES = 300
FORMS: dict[str, dict[str, object]] = {
    "bare": {},
    "zstd": {"level": 1},
    "crc": {"checksum": True},
    "zstd+crc": {"level": 3, "checksum": True},
}
each_form = pytest.mark.parametrize("form", FORMS)


def booted(pages: int = PAGES, guest_type: GuestType = GuestType.HVM) -> ModelGuest:
    return ModelGuest.booted(pages, guest_type)


def empty(pages: int = PAGES, guest_type: GuestType = GuestType.HVM) -> StartingGuest:
    return StartingGuest.empty(pages, guest_type)


# A guest arrives


@each_form
@pytest.mark.parametrize("guest_type", list(GuestType))
@pytest.mark.parametrize("place", ["tcp", "unix"])
def test_a_guest_arrives_equal_and_runs_there_and_stands_still_here(
    form: str, guest_type: GuestType, place: str, tmp_path: Path
) -> None:
    source, target = booted(guest_type=guest_type), empty(guest_type=guest_type)
    address: Address = LOOPBACK if place == "tcp" else UnixAddress(str(tmp_path / "guest.sock"))
    workload = Workload(source, working_set=PAGES // 2, turmoil=0.5)

    def busy(stats: PrecopyStats) -> Decision:
        workload.step(100)
        return max_iterations(3)(stats)

    with receiving(target, address) as receiver:
        result = attempt(source, receiver.address, policy=busy, **FORMS[form])
    assert isinstance(result, SendResult), result
    assert content_equal(source, target)
    assert (source.suspended, target.started, result.state) == (True, True, GuestState.RUNNING)
    assert receiver.result is not None
    assert (receiver.result.state, receiver.result.warnings) == (GuestState.RUNNING, [])
    assert result.pages_received == result.save.pages == receiver.result.restore.pages
    assert result.save.downtime_s <= result.downtime_s <= result.seconds


def test_a_bare_stream_costs_two_messages_and_not_one_octet_more() -> None:
    source = booted()
    with receiving(empty()) as receiver:
        result = sending(source, receiver.address)
    assert result.wire_octets == result.save.octets + (8 + 8) + 8  # OFFER, GO


def test_a_compressed_stream_is_shorter_on_the_wire() -> None:
    source = ModelGuest.booted(PAGES, content=False)
    with receiving(empty()) as receiver:
        result = sending(source, receiver.address, level=1)
    assert result.wire_octets < result.save.octets / 4


def test_a_target_that_is_to_stay_paused_is_not_started() -> None:
    source, target = booted(), empty()
    with receiving(target, paused=True) as receiver:
        result = sending(source, receiver.address)
    assert (result.state, target.started, source.suspended) == (GuestState.PAUSED, False, True)


def test_a_target_that_is_no_running_guest_is_complete() -> None:
    source, target = booted(), ModelGuest.empty(PAGES)
    with receiving(target) as receiver:
        result = sending(source, receiver.address)
    assert result.state is GuestState.COMPLETE
    assert content_equal(source, target)


def test_a_guest_of_many_mebibytes_passes_every_buffer_on_the_way() -> None:
    for form in FORMS.values():
        source, target = booted(8192), empty(8192)
        with receiving(target) as receiver:
            assert isinstance(attempt(source, receiver.address, **form), SendResult)
        assert content_equal(source, target)


def test_a_connection_sends_at_once_and_notices_a_dead_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        with Link(sock, peer="x", timeout_s=None):
            options = {
                name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in (
                    "TCP_NODELAY",
                    "TCP_KEEPIDLE",
                    "TCP_KEEPINTVL",
                    "TCP_KEEPCNT",
                    "TCP_USER_TIMEOUT",
                )
            }
            assert options == {
                "TCP_NODELAY": 1,
                "TCP_KEEPIDLE": 10,
                "TCP_KEEPINTVL": 5,
                "TCP_KEEPCNT": 4,
                "TCP_USER_TIMEOUT": 30_000,
            }
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


# The connection is cut


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(FORMS)), st.data())
def test_wherever_the_connection_is_cut_the_guest_runs_at_most_once(form: str, data: st.DataObject) -> None:
    """Forth go some 1.2 MB; back go ACCEPT (8 octets), LOADED (16) and RUNNING (16)."""
    forth = data.draw(st.none() | st.integers(0, 1_300_000) | st.integers(0, 40))
    back = data.draw(st.none() | st.integers(0, 40))
    source, target = booted(), empty()
    with receiving(target) as receiver, wire(receiver.address, forth=forth, back=back) as through:
        outcome = attempt(source, through, **FORMS[form])
        if receiver.error is None and not receiver.accepted:  # it still listens: nothing has come of it
            _call_off(receiver.address)
    assert not (target.started and not source.suspended), "it runs twice"
    match outcome:
        case SendResult():
            assert target.started
            assert content_equal(source, target)
        case HandoverError():
            assert source.suspended
            assert "stays suspended" in str(outcome)
        case _:
            assert (source.suspended, target.started) == (False, False)
    assert target.started == (receiver.result is not None)


def _call_off(address: Address) -> None:
    """End a receiver that was cut off before it heard an offer, by one that it fails."""
    with_offer = connected(address)
    with_offer.sendall(Offer(framing=0, compression=0, checksum=0, guest_type=2).with_head())
    with_offer.close()


@each_form
def test_a_connection_that_ends_between_go_and_running_leaves_the_guest_suspended(form: str) -> None:
    source, target = booted(), empty()
    with receiving(target) as receiver, wire(receiver.address, back=8 + 16) as through:  # ACCEPT, LOADED
        outcome = attempt(source, through, **FORMS[form])
    assert isinstance(outcome, HandoverError)
    assert (source.suspended, target.started) == (True, True)
    assert receiver.result is not None


@each_form
def test_a_connection_that_ends_before_loaded_lets_the_guest_run_on(form: str) -> None:
    source, target = booted(), empty()
    with receiving(target) as receiver, wire(receiver.address, back=8) as through:  # ACCEPT
        outcome = attempt(source, through, **FORMS[form])
    assert isinstance(outcome, ConnectionLostError)
    assert (source.suspended, target.started) == (False, False)
    assert isinstance(receiver.error, ConnectionLostError)


def test_a_receiver_that_dies_behind_go_leaves_the_guest_suspended_and_says_what_to_look_at() -> None:
    source, target = booted(), empty()
    target.start_fails = UnsettledError("its monitor is gone")
    with receiving(target) as receiver:
        outcome = attempt(source, receiver.address)
    assert isinstance(outcome, HandoverError)
    assert source.suspended
    for words in ("handed over", str(receiver.address), "never runs twice", "resume it here"):
        assert words in str(outcome)
    assert receiver.error is target.start_fails


def test_a_guest_that_cannot_be_resumed_is_said_so_beside_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = booted(), empty()
    target.start_fails = GuestError("the machine has no processor")

    def resume() -> None:
        raise GuestError("QEMU is gone")

    monkeypatch.setattr(source, "resume", resume)
    with receiving(target) as receiver:
        outcome = attempt(source, receiver.address)
    assert isinstance(outcome, GuestError)
    assert "failed: the machine has no processor; and the guest could not be resumed here" in str(outcome)


def test_a_guest_that_does_not_start_there_runs_on_here() -> None:
    source, target = booted(), empty()
    target.start_fails = GuestError("the machine has no processor")
    with receiving(target) as receiver:
        outcome = attempt(source, receiver.address)
    assert isinstance(outcome, RemoteError)
    assert "failed: the machine has no processor" in str(outcome)
    assert not source.suspended
    assert receiver.error is target.start_fails


# An end fails


@each_form
def test_the_senders_user_reads_the_receivers_own_reason(form: str) -> None:
    source, target = booted(8192), empty(4096)
    with receiving(target) as receiver:
        outcome = attempt(source, receiver.address, **FORMS[form])
    assert isinstance(outcome, RemoteError)
    assert "PFN 0x1000 is above the target's highest, 0xfff" in str(outcome)
    assert str(receiver.address) in str(outcome)
    assert not source.suspended
    assert isinstance(receiver.error, StreamError)


def test_a_target_that_cannot_be_opened_is_a_reason_before_any_page() -> None:
    source = booted()

    def opening() -> None:
        raise FileNotFoundError(2, "No such file or directory", "/run/machine.qmp")

    with receiving(empty(), opening=opening) as receiver:
        outcome = attempt(source, receiver.address)
    assert isinstance(outcome, RemoteError)
    assert "failed: /run/machine.qmp: No such file or directory" in str(outcome)
    assert not source.suspended


@each_form
def test_a_guest_of_the_other_type_is_refused_with_the_reason(form: str) -> None:
    source, target = booted(), empty(guest_type=GuestType.PV)
    with receiving(target) as receiver:
        outcome = attempt(source, receiver.address, **FORMS[form])
    assert isinstance(outcome, RemoteError)
    assert not source.suspended


@each_form
def test_a_save_that_fails_is_the_senders_own_error_and_the_receiver_discards(form: str) -> None:
    source, target = booted(), empty()

    def policy(stats: PrecopyStats) -> Decision:
        return Decision.ABORT if stats.iteration else Decision.CONTINUE_PRECOPY

    with receiving(target) as receiver:
        outcome = attempt(source, receiver.address, policy=policy, **FORMS[form])
    assert "the policy broke the save off" in str(outcome)
    assert (source.suspended, target.started) == (False, False)
    assert isinstance(receiver.error, MigstreamError)


@each_form
def test_an_interrupt_lets_the_guest_run_on(form: str) -> None:
    source, target = booted(), empty()

    def policy(stats: PrecopyStats) -> Decision:
        raise KeyboardInterrupt

    with receiving(target) as receiver, pytest.raises(KeyboardInterrupt):
        attempt(source, receiver.address, policy=policy, **FORMS[form])
    assert (source.suspended, target.started) == (False, False)
    assert isinstance(receiver.error, MigstreamError)


@pytest.mark.parametrize("form", ["crc", "zstd+crc"])
def test_an_octet_that_is_damaged_on_the_way_is_found_and_told_at_both_ends(form: str) -> None:
    source, target = booted(), empty()
    with receiving(target) as receiver, wire(receiver.address, damage=100_000) as through:
        outcome = attempt(source, through, **FORMS[form])
    assert isinstance(receiver.error, StreamError)
    assert receiver.error.layer == "transport"
    assert receiver.error.offset is not None
    assert isinstance(outcome, RemoteError)
    assert "offset" in str(outcome)
    assert "damaged on the way: migrate again" in str(outcome)
    assert (source.suspended, target.started) == (False, False)


@each_form
def test_failures_leave_no_thread_and_no_descriptor_behind(form: str) -> None:
    def fail_once() -> None:
        with receiving(empty(4096)) as receiver:
            assert isinstance(attempt(booted(8192), receiver.address, **FORMS[form]), RemoteError)

    fail_once()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        fail_once()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_nobody_who_listens_is_said_so() -> None:
    with listen(LOOPBACK) as (_, address):
        pass
    source = booted()
    outcome = attempt(source, address)
    assert isinstance(outcome, ConnectionLostError)
    assert f"nobody listens at {address}: start 'migstream receive' there first" in str(outcome)
    assert not source.suspended


# An end that says nothing


@contextlib.contextmanager
def scripted(*answers: bytes) -> Iterator[Address]:
    """Listen for one caller, who is sent ``answers`` and never read from, until the block ends."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as sock:
                sock.sendall(b"".join(answers))
                over.wait(JOIN_S)

        thread = threading.Thread(target=answer)
        thread.start()
        yield TcpAddress(*listener.getsockname())
        over.set()
        thread.join()


@pytest.mark.parametrize("answers", [[], [Accept().with_head()]])
@each_form
def test_a_receiver_that_does_nothing_is_given_up_after_the_timeout(form: str, answers: list[bytes]) -> None:
    source = booted(16384)  # more than the buffers on the way hold
    with scripted(*answers) as address:
        outcome = attempt(source, address, timeout_s=0.3, **FORMS[form])
    assert isinstance(outcome, DeadlineError), outcome
    assert not source.suspended


def test_a_receiver_that_says_nothing_behind_go_is_given_up_with_the_guest_suspended() -> None:
    source = booted()
    loaded = Loaded(pages=1, warnings=b"").with_head()
    with scripted(Accept().with_head(), loaded) as address:
        outcome = attempt(source, address, timeout_s=0.3)
    assert isinstance(outcome, HandoverError)
    assert "did nothing for 0.3 s" in str(outcome)
    assert source.suspended


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [
        ([b"HTTP/1.1 400 Bad Request\r\n"], "is no migstream of this kind"),
        ([b"\x15\x03\x03\x00\x02\x02\x46"], "speaks TLS, and this end does not"),
        ([Refuse(reason=b"too late\x1b").with_head()], "refuses: too late"),
        ([Failed(reason=b"\xff\xfe").with_head()], "failed: "),
        ([Running(state=1).with_head()], "sent RUNNING, 8 octets long"),
        ([Accept().with_head()[:4] + b"\x02\0\xff\xff"], "sent ACCEPT, 65535 octets long"),
        ([Accept().with_head()[:4] + b"\x63\0\0\0"], "sent a message of the kind 99"),
        ([Accept().with_head(), b"MIGT\x04\0\x02\0ab"], "LOADED that is cut short"),
        ([Accept().with_head(), Loaded(pages=1, warnings=b"").with_head(), b"x" * 8], "handed over"),
        (
            [Accept().with_head(), Loaded(pages=1, warnings=b"").with_head(), Running(state=9).with_head()],
            "in state 9, which is none",
        ),
    ],
)
def test_a_receiver_that_talks_nonsense_is_an_error_that_says_so(
    answers: list[bytes], complaint: str
) -> None:
    source = booted()
    with scripted(*answers) as address:
        outcome = attempt(source, address, timeout_s=5)
    assert complaint in str(outcome)
    assert source.suspended == isinstance(outcome, HandoverError)


OFFER = Offer(framing=0, compression=0, checksum=0, guest_type=2)


@pytest.mark.parametrize("offer", [OFFER, Offer(framing=1, compression=1, checksum=1, guest_type=2)])
@pytest.mark.parametrize("more", [b"", b"\0\0\0"])
def test_a_sender_that_does_nothing_is_given_up_after_the_timeout(offer: Offer, more: bytes) -> None:
    target = empty()
    with contextlib.ExitStack() as until_the_receiver_ends, receiving(target, timeout_s=0.3) as receiver:
        sock = until_the_receiver_ends.enter_context(connected(receiver.address))
        sock.sendall(offer.with_head() + more)
    assert isinstance(receiver.error, DeadlineError)
    assert not target.started


# Strangers


STRANGERS = {
    "http": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "is no migstream of this kind"),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", "speaks TLS, and this end does not"),
    "nothing": (b"", "closed the connection while an offer was awaited"),
    "half": (OFFER.with_head()[:9], "closed the connection while an offer was awaited"),
    "another message": (Go().with_head(), "sent GO, 0 octets long"),
    "a huge message": (b"MIGT\x01\0\xff\xff", "sent OFFER, 65535 octets long"),
    "another version": (
        Offer(version=2, framing=0, compression=0, checksum=0, guest_type=2).with_head(),
        "it offers version 2 of the protocol, this end has 1: update the older",
    ),
    "another compression": (
        Offer(framing=1, compression=7, checksum=0, guest_type=2).with_head(),
        "it offers the compression 7, which this receiver has not: it has 0 NONE, 1 ZSTD",
    ),
    "another guest": (
        Offer(framing=0, compression=0, checksum=0, guest_type=3).with_head(),
        "it offers the guest type 3, which this receiver has not: it has 1 PV, 2 HVM",
    ),
    "no chunks": (
        Offer(framing=0, compression=1, checksum=0, guest_type=2).with_head(),
        "it offers a bare stream with compression",
    ),
}


def test_strangers_are_told_and_ignored_and_the_migration_behind_them_is_taken() -> None:
    source, target = booted(), empty()
    with receiving(target) as receiver:
        for octets, _ in STRANGERS.values():
            with connected(receiver.address) as sock:
                sock.sendall(octets)
                sock.shutdown(socket.SHUT_WR)
        sending(source, receiver.address)
    assert content_equal(source, target)
    assert len(receiver.ignored) == len(STRANGERS)
    for told, (_, complaint) in zip(receiver.ignored, STRANGERS.values(), strict=True):
        assert complaint in told


def test_a_refused_offer_is_answered_with_the_reason() -> None:
    source, target = booted(), empty()
    octets, complaint = STRANGERS["another version"]
    with receiving(target) as receiver:
        with connected(receiver.address) as sock:
            sock.sendall(octets)
            answer = sock.makefile("rb").read()
        sending(source, receiver.address)
    assert answer[:6] == b"MIGT\x03\0"
    assert answer[8:].decode() == complaint


def test_a_stranger_who_says_nothing_is_dropped_after_the_hand_shakes_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(receive_module, "HANDSHAKE_S", 0.1)
    source, target = booted(), empty()
    with receiving(target) as receiver, connected(receiver.address):
        sending(source, receiver.address)
    assert "did nothing for 0.1 s while an offer was awaited" in receiver.ignored[0]
    assert content_equal(source, target)


def test_a_second_migration_is_refused_while_one_is_under_way() -> None:
    source, target, second = booted(), empty(), booted()
    outcomes = []

    def restoring(into: RestoreTarget, fd: int) -> RestoreResult:
        outcomes.append(attempt(second, receiver.address))
        return restore(into, fd)

    with receiving(target, restoring=restoring) as receiver:
        sending(source, receiver.address)
    assert isinstance(outcomes[0], ConnectionLostError)
    assert "takes one migration" in str(outcomes[0])
    assert not second.suspended
    assert content_equal(source, target)


def test_octets_behind_the_last_record_are_refused_before_go() -> None:
    source, target = booted(), empty()
    with receiving(target) as receiver:
        outcome = _with_surplus(source, receiver.address, checksum=True)
    assert isinstance(outcome, RemoteError)
    assert "more octets follow the stream's last record" in str(outcome)
    assert (source.suspended, target.started) == (False, False)
    target = empty()
    with receiving(target) as receiver:
        outcome = _with_surplus(source, receiver.address, checksum=False)
    assert isinstance(receiver.error, ProtocolError)
    assert (source.suspended, target.started) == (False, False)


def _with_surplus(source: ModelGuest, address: Address, *, checksum: bool) -> SendResult | MigstreamError:
    from migstream.engines.save import SaveCallbacks, SaveResult, save
    from migstream.transport.send import send

    def surplus(fd: int, suspend: object) -> SaveResult:
        result = save(source, fd, live=True, callbacks=SaveCallbacks())
        os.write(fd, b"more than that")
        return result

    try:
        return send(source, address, surplus, checksum=checksum)
    except MigstreamError as exc:
        return exc


# Addresses


@pytest.mark.parametrize(
    ("text", "listening", "expected"),
    [
        ("host.example:7000", False, TcpAddress("host.example", 7000)),
        ("192.0.2.7:1", False, TcpAddress("192.0.2.7", 1)),
        ("[::1]:7000", False, TcpAddress("::1", 7000)),
        ("[fe80::1%eth0]:7000", False, TcpAddress("fe80::1%eth0", 7000)),
        ("unix:/run/guest.sock", False, UnixAddress("/run/guest.sock")),
        ("unix:relative:with:colons", True, UnixAddress("relative:with:colons")),
        ("7000", True, TcpAddress("127.0.0.1", 7000)),
        ("0", True, TcpAddress("127.0.0.1", 0)),
        ("0.0.0.0:0", True, TcpAddress("0.0.0.0", 0)),
        ("[::]:65535", True, TcpAddress("::", 65535)),
    ],
)
def test_an_address_is_understood_and_says_itself(text: str, listening: bool, expected: Address) -> None:
    parsed = parse_address(text, listening=listening)
    assert parsed == expected
    assert parse_address(str(parsed), listening=listening) == parsed


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("7000", "is no address: write host.example:7000, [::1]:7000 or unix:/run/guest.sock"),
        ("host", "is no address"),
        ("", "is no address"),
        ("host:", "'' is no port (1 to 65535)"),
        ("host:0", "'0' is no port (1 to 65535)"),
        ("host:65536", "is no port"),
        ("host:http", "is no port"),
        ("host:-1", "is no port"),
        ("host:7_0", "is no port"),
        ("host:\u0667\u0660", "is no port"),
        (":7000", "'' is no host's name"),
        ("ho st:7000", "is no host's name"),
        ("http://host:7000", "an IPv6 address stands in brackets"),
        ("::1:7000", "an IPv6 address stands in brackets: write [::1]:PORT"),
        ("[::g]:7000", "[::g] holds no IPv6 address"),
        ("[host]:7000", "[host] holds no IPv6 address"),
        ("unix:", "unix: needs a path behind it"),
        ("unix:" + "x" * 108, "at most 107 octets long"),
        ("unix:a\0b", "unix: needs a path"),
    ],
)
def test_nonsense_is_refused_with_an_example(text: str, complaint: str) -> None:
    with pytest.raises(AddressError) as raised:
        parse_address(text)
    assert complaint in str(raised.value)


def test_a_unix_sockets_file_is_its_owners_alone_and_goes_with_the_listener(tmp_path: Path) -> None:
    path = tmp_path / "guest.sock"
    with listen(UnixAddress(str(path))):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_an_abandoned_socket_is_replaced_and_any_other_file_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "guest.sock"
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(path))
    with listen(UnixAddress(str(path))) as (_, address):
        assert address == UnixAddress(str(path))
        with pytest.raises(AddressError, match="Address already in use"), listen(address):
            pass
    path.write_text("precious")
    with pytest.raises(AddressError, match="Address already in use"), listen(UnixAddress(str(path))):
        pass
    assert path.read_text() == "precious"


def test_a_port_that_is_taken_is_said_so() -> None:
    with (
        listen(LOOPBACK) as (_, address),
        pytest.raises(AddressError, match="choose another address"),
        listen(address),
    ):
        pass
