"""Migrations that go wrong: the error says what to do, and the source runs on as if nothing had been."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.qemu.commands import Ended, migstream, receiving, run
from tests.qemu.conftest import Start
from tests.qemu.machine import ANONYMOUS, MIB, TURN, Machine, flags, wait_until
from tests.qemu.relay import Relay, relay

SLOWLY = ("--bandwidth", "100M", "--json")  # so that the guest writes some MiB in pass 1


def check_source(source: Machine) -> None:
    """The guest runs where it was, nobody watches its memory, and nothing of it is lost."""
    assert source.status == "running"
    assert source.tracked == []
    source.wait_for_count(source.count + TURN)


#: Starts a relay in front of the socket in the test's folder: its argument says when to hold the stream.
Passing = Callable[[Callable[[], bool]], Relay]


@pytest.fixture
def passing(tmp_path: Path) -> Iterator[Passing]:
    with contextlib.ExitStack() as stack:

        def start(hold: Callable[[], bool]) -> Relay:
            return stack.enter_context(relay(tmp_path / "relay", tmp_path / "socket", hold))

        yield start


def migrate(source: Machine, address: str, *options: str) -> Ended:
    return run("migrate", f"qemu:{source.qmp}", address, *options)


# Before anything is sent


def test_a_qmp_socket_that_is_not_there(tmp_path: Path, destination: Machine) -> None:
    failed = run("migrate", f"qemu:{tmp_path}/absent.qmp", f"qemu:{destination.qmp}")
    assert failed.code == 1
    assert f"{tmp_path}/absent.qmp" in failed.errors
    assert "-qmp" in failed.errors


def test_a_qmp_socket_that_nobody_listens_at(tmp_path: Path, destination: Machine) -> None:
    abandoned = tmp_path / "abandoned.qmp"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(abandoned))
    failed = run("migrate", f"qemu:{abandoned}", f"qemu:{destination.qmp}")
    assert failed.code == 1
    assert str(abandoned) in failed.errors


def test_a_machine_whose_memory_is_not_shared(start: Start, destination: Machine) -> None:
    source = start("anonymous", flags(backend=ANONYMOUS), incoming=False)
    source.command("cont")
    failed = run("migrate", f"qemu:{source.qmp}", f"qemu:{destination.qmp}")
    assert failed.code == 1
    assert "memory-backend-memfd" in failed.errors
    assert "share=on" in failed.errors
    assert source.status == "running"
    assert source.tracked == []


@pytest.mark.parametrize(
    ("made_of", "said"),
    [(flags(mib=MIB // 2), "MiB"), (flags(machine_type="q35"), "q35")],
    ids=["other-size", "other-type"],
)
def test_a_destination_of_another_kind(
    source: Machine, start: Start, tmp_path: Path, made_of: list[str], said: str
) -> None:
    destination = start("other", made_of)
    address = tmp_path / "socket"
    with receiving(address, destination.qmp) as receiver:
        failed = migrate(source, f"unix:{address}")
        refused = receiver.wait()
    assert (failed.code, refused.code) == (1, 1)
    assert said in failed.errors  # the receiver's reason reaches the sender
    assert said in refused.errors
    assert not destination.memory().any()
    check_source(source)


def test_nobody_listens(source: Machine, tmp_path: Path) -> None:
    failed = migrate(source, f"unix:{tmp_path}/nobody")
    assert failed.code == 1
    assert "migstream receive" in failed.errors
    check_source(source)


def test_a_certificate_of_another_authority(source: Machine, destination: Machine, tmp_path: Path) -> None:
    ours, theirs, strangers = (certificate(tmp_path, name) for name in ("sender", "receiver", "stranger"))
    address = tmp_path / "socket"
    with receiving(address, destination.qmp, *identity(theirs), "--tls-ca", ours[0]) as receiver:
        trusting = ("--tls-ca", theirs[0], "--tls-name", "receiver")
        failed = migrate(source, f"unix:{address}", *identity(strangers), *trusting)
        assert failed.code == 1
        assert "--tls-ca" in failed.errors
        check_source(source)
        sent = migrate(source, f"unix:{address}", *identity(ours), *trusting)
        assert sent.code == 0, sent
        assert receiver.wait().code == 0


def certificate(folder: Path, name: str) -> tuple[str, str]:
    """Make a certificate for the host ``name`` that is its own authority; return its file and its key's."""
    files = f"{folder}/{name}.pem", f"{folder}/{name}.key"
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    names = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run([*command, *names, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


def identity(files: tuple[str, str]) -> list[str]:
    return ["--tls-cert", files[0], "--tls-key", files[1]]


# In pass 2


def test_the_destination_dies_in_pass_2(
    source: Machine,
    destination: Machine,
    tmp_path: Path,
    passing: Passing,
) -> None:
    on_the_way = passing(lambda: '"pass"' in sender.out)  # pass 1 is over
    with (
        receiving(tmp_path / "socket", destination.qmp) as receiver,
        migstream("migrate", f"qemu:{source.qmp}", on_the_way.address, *SLOWLY) as sender,
    ):
        assert on_the_way.held.wait(60)
        destination.kill()
        on_the_way.release()
        lost, failed = receiver.wait(), sender.wait()
    assert (failed.code, lost.code) == (1, 1)
    assert "QEMU" in lost.errors
    assert failed.errors
    check_source(source)


def test_the_receiver_dies_in_pass_2(
    source: Machine,
    destination: Machine,
    tmp_path: Path,
    passing: Passing,
) -> None:
    on_the_way = passing(lambda: '"pass"' in sender.out)  # pass 1 is over
    with (
        receiving(tmp_path / "socket", destination.qmp) as receiver,
        migstream("migrate", f"qemu:{source.qmp}", on_the_way.address, *SLOWLY) as sender,
    ):
        assert on_the_way.held.wait(60)
        receiver.kill()
        on_the_way.release()
        failed = sender.wait()
    assert failed.code == 1
    assert destination.status == "inmigrate"  # it has not got a guest, and does not run one
    check_source(source)


def test_the_source_dies_in_pass_2(
    source: Machine,
    destination: Machine,
    tmp_path: Path,
    passing: Passing,
) -> None:
    on_the_way = passing(lambda: '"pass"' in sender.out)  # pass 1 is over
    with (
        receiving(tmp_path / "socket", destination.qmp) as receiver,
        migstream("migrate", f"qemu:{source.qmp}", on_the_way.address, *SLOWLY) as sender,
    ):
        assert on_the_way.held.wait(60)
        source.kill()
        on_the_way.release()
        failed, lost = sender.wait(), receiver.wait()
    assert (failed.code, lost.code) == (1, 1)
    assert "QEMU" in failed.errors
    assert destination.status != "running"


def test_the_sender_is_killed_in_pass_2(
    source: Machine,
    destination: Machine,
    tmp_path: Path,
    passing: Passing,
) -> None:
    on_the_way = passing(lambda: '"pass"' in sender.out)  # pass 1 is over
    with (
        receiving(tmp_path / "socket", destination.qmp) as receiver,
        migstream("migrate", f"qemu:{source.qmp}", on_the_way.address, *SLOWLY) as sender,
    ):
        assert on_the_way.held.wait(60)
        sender.kill()
        wait_until("the sender's processes to go", lambda: not sender.left_behind())
        on_the_way.cut()
        lost = receiver.wait()
    assert lost.code == 1
    assert destination.status != "running"
    check_source(source)


# In the final phase


def test_the_connection_breaks_in_the_final_phase_and_a_second_try_succeeds(
    source: Machine,
    destination: Machine,
    tmp_path: Path,
    start: Start,
    passing: Passing,
) -> None:
    on_the_way = passing(lambda: source.status == "paused")
    with (
        receiving(tmp_path / "socket", destination.qmp) as receiver,
        migstream("migrate", f"qemu:{source.qmp}", on_the_way.address) as sender,
    ):
        assert on_the_way.held.wait(60)
        on_the_way.cut()
        failed, lost = sender.wait(), receiver.wait()
    assert (failed.code, lost.code) == (1, 1)
    assert "connection" in failed.errors
    assert destination.status != "running"
    check_source(source)

    second = start("second")
    with receiving(tmp_path / "socket2", second.qmp) as receiver:
        sent = migrate(source, f"unix:{tmp_path}/socket2")
        assert sent.code == 0, sent
        assert receiver.wait().code == 0
    second.wait_for_count(source.count + TURN)


# Two at a time


def test_a_second_migration_of_the_same_guest_is_refused_and_the_first_goes_on(
    source: Machine,
    destination: Machine,
    tmp_path: Path,
    start: Start,
    passing: Passing,
) -> None:
    third = start("third")
    on_the_way = passing(lambda: bool(source.tracked))
    with (
        receiving(tmp_path / "socket", destination.qmp) as receiver,
        receiving(tmp_path / "socket3", third.qmp),
        migstream("migrate", f"qemu:{source.qmp}", on_the_way.address) as first,
    ):
        assert on_the_way.held.wait(60)
        second = migrate(source, f"unix:{tmp_path}/socket3")
        assert second.code == 1, second
        assert "another" in second.errors
        assert source.status == "running"
        on_the_way.release()
        assert first.wait().code == 0
        assert receiver.wait().code == 0
    assert source.status == "paused"
    assert source.tracked == []
    destination.wait_for_count(source.count + TURN)
