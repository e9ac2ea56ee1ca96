"""``migstream receive`` and ``migstream migrate SRC HOST:PORT`` as commands, in processes of their own."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from migstream.cli.group import group
from migstream.transport.messages import Accept, Loaded
from tests.test_transport_tls import run_recipe

LIMIT_S = 60
MAIN = "from migstream.cli import main; main()"


def spawn(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextlib.contextmanager
def receiver(*args: str, address: str = "0") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run ``migstream receive``; yield it and the address that it says it listens at."""
    process = spawn("receive", address, *args)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert line.startswith("listening "), line + process.stderr.read()
        yield process, line.removeprefix("listening ").strip()
    finally:
        process.kill()
        process.communicate()


def migrate(source: str, *args: str) -> tuple[int, str, str]:
    process = spawn("migrate", source, *args)
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, err


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, err


def in_process(*args: str) -> tuple[int, str, str]:
    """Run a command in this process: quicker, for what needs no other."""
    result = CliRunner().invoke(group, args)
    return result.exit_code, result.stdout, result.stderr


def test_a_guest_migrates_and_both_ends_tell_what_happened(tmp_path: Path) -> None:
    (tmp_path / "memory.bin").write_bytes(b"".join(bytes([n]) * 4096 for n in range(1, 201)))
    with receiver(f"raw:{tmp_path / 'copy.bin'}") as (process, address):
        assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
        code, out, err = migrate(f"raw:{tmp_path / 'memory.bin'}", address, "--stopped")
        assert (code, err) == (0, "")
        assert re.match(
            r"migrated 200 pages in 1 passes and [\d.]+ s: [\d.]+ MB of stream, [\d.]+ MB on", out
        )
        assert f"the guest is complete at {address}; it stood still for" in out
        code, out, err = ended(process)
    assert code == 0
    assert out.startswith("received 200 pages in ")
    assert err.startswith("accepted 127.0.0.1:")
    assert (tmp_path / "copy.bin").read_bytes() == (tmp_path / "memory.bin").read_bytes()


def test_with_json_both_ends_write_events_and_a_result() -> None:
    with receiver("model:4M", "--json") as (process, address):
        code, sent, err = in_process(
            "migrate", "model:4M,busy=2000", address, "--json", "--compress", "--checksum"
        )
        assert (code, err) == (0, "")
        _, received, _ = ended(process)
    events = [json.loads(line) for line in received.splitlines()]
    assert [events[0]["event"], events[0]["address"], events[1]["event"]] == [
        "listening",
        address,
        "accepted",
    ]
    assert {event["event"] for event in events[2:-1]} == {"pass"}
    there = events[-1]
    lines = [json.loads(line) for line in sent.splitlines()]
    here = lines[-1]
    assert (here["event"], here["result"], here["destination"], here["error"]) == (
        "result",
        "migrated",
        "complete",
        None,
    )
    assert (there["result"], there["guest"], there["pages"]) == ("received", "complete", here["pages"])
    passes = [{**report, "event": "pass"} for report in here["passes"]]
    assert passes == lines[:-1]
    assert [report["kind"] for report in passes][-1] == "stop-and-copy"
    assert here["octets"] > sum(report["octets"] for report in passes)
    assert here["wire_octets"] > 0
    assert here["bandwidth"] > 0
    assert here["dirty_rate"] >= 0
    assert 0 < here["downtime_s"] <= here["seconds"]


def test_a_unix_socket_serves_as_well(tmp_path: Path) -> None:
    place = f"unix:{tmp_path / 'guest.sock'}"
    with receiver("model:4M", "--timeout", "30", address=place) as (process, address):
        assert address == place
        code, _, err = in_process("migrate", "model:4M", place, "--timeout", "30")
        assert (code, err) == (0, "")
        assert ended(process)[0] == 0
    assert not (tmp_path / "guest.sock").exists()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")
def test_the_pages_commands_migrate_over_tls(tmp_path: Path) -> None:
    run_recipe(tmp_path)

    def files(host: str) -> list[str]:
        authority = str(tmp_path / "migration-ca.pem")
        own = [str(tmp_path / f"{host}.{end}") for end in ("pem", "key")]
        return ["--tls-cert", own[0], "--tls-key", own[1], "--tls-ca", authority]

    with receiver("model:4M", *files("localhost"), address="localhost:0") as (process, address):
        code, _, err = in_process("migrate", "model:4M", address)
        assert code == 1
        assert "TLS is wanted here" in err
        there = address.replace("127.0.0.1", "localhost").replace("[::1]", "localhost")
        code, _, err = in_process("migrate", "model:4M", there, *files("source"), "--compress", "--checksum")
        assert (code, err) == (0, "")
        code, _, err = ended(process)
    assert code == 0
    assert "ignored 127.0.0.1:" in err or "ignored [::1]:" in err


def test_the_receivers_reason_reaches_both_users() -> None:
    with receiver("model:4M", "--json") as (process, address):
        code, _, err = in_process("migrate", "model:8M", address)
        assert code == 1
        assert err.startswith(
            f"migstream: model:8M to {address}: the destination at {address} failed: offset "
        )
        assert "PFN 0x400 is above the target's highest, 0x3ff" in err
        code, out, err = ended(process)
    assert code == 1
    end = json.loads(out.splitlines()[-1])
    assert (end["result"], end["error"]["record"]["type"]) == ("failed", "PAGE_DATA")
    assert "PFN 0x400 is above" in err


def wait_for_pages(directory: Path) -> None:
    """Wait until the image that comes in there has some."""
    for _ in range(LIMIT_S * 100):
        if any(path.stat().st_blocks for path in directory.iterdir()):
            return
        time.sleep(0.01)
    raise AssertionError("no page has come in")


@pytest.mark.parametrize("form", [[], ["--checksum"]])
def test_a_receiver_that_is_killed_leaves_the_sender_with_an_error(form: list[str], tmp_path: Path) -> None:
    with receiver(f"raw:{tmp_path / 'copy.bin'}") as (process, address):
        sender = spawn("migrate", "model:64M", address, "--bandwidth", "8M", "--json", *form)
        wait_for_pages(tmp_path)
        process.kill()
        code, out, err = ended(sender)
    assert code == 1
    assert json.loads(out.splitlines()[-1])["result"] == "failed"
    assert "the receiver closed the stream" in err or "closed the connection" in err or "broke" in err


@pytest.mark.parametrize("form", [[], ["--checksum"]])
def test_a_sender_that_is_killed_leaves_the_receiver_with_an_error_and_nothing_else(
    form: list[str], tmp_path: Path
) -> None:
    with receiver(f"raw:{tmp_path / 'copy.bin'}") as (process, address):
        sender = spawn("migrate", "model:64M", address, "--bandwidth", "8M", *form)
        wait_for_pages(tmp_path)
        sender.kill()
        sender.communicate()
        code, _, err = ended(process)
    assert code == 1
    assert "closed the connection" in err or "the channel broke" in err
    assert list(tmp_path.iterdir()) == []


def test_a_lost_handover_has_an_exit_code_and_a_result_of_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(Accept().with_head() + Loaded(pages=1, warnings=b"").with_head())
                last = b""
                while last != b"MIGT\x06\0\0\0":  # GO
                    last = (last + sock.recv(1 << 16))[-8:]

        thread = threading.Thread(target=answer)
        thread.start()
        code, out, err = in_process("migrate", "model:1M", f"127.0.0.1:{listener.getsockname()[1]}", "--json")
        thread.join(LIMIT_S)
    assert code == 3
    assert json.loads(out.splitlines()[-1])["result"] == "unsettled"
    assert "the guest was handed over, but the destination" in err
    assert "It stays suspended here, so that it never runs twice" in err


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["receive", "nonsense", "model:4M"], "'nonsense' is no address: write host.example:7000"),
        (["receive", "0", "modle:4M"], "there is no kind of guest 'modle'"),
        (["receive", "0", "model:4M", "--tls-cert", "x"], "TLS needs --tls-key and --tls-ca too"),
        (["migrate", "model:4M", "host"], "DST: 'host' is no address"),
        (["migrate", "model:4M", "host"], "or name a guest, such as model:64M"),
        (["migrate", "model:4M", "host:7000", "--tcp"], "--tcp is for two guests here"),
        (
            ["migrate", "model:4M", "host:7000", "--type", "remus", "--checkpoints", "2"],
            "--type remus needs a guest as DST",
        ),
        (["migrate", "model:4M", "model:4M", "--compress"], "are for a DST behind a network"),
        (["migrate", "model:4M", "model:4M", "--checksum"], "are for a DST behind a network"),
        (["migrate", "--compress", "model:4M", "host:7000"], "write --compress=zstd"),
        (["migrate", "model:4M", "host:7000", "--compress=zstd:20"], "with 1 to 19"),
        (["migrate", "model:4M", "host:7000", "--compress=gzip"], "expected zstd"),
        (["migrate", "model:4M", "host:7000", "--tls-name", "x"], "--tls-name needs --tls-cert"),
    ],
)
def test_wrong_usage_is_told_with_what_would_be_right(args: list[str], complaint: str) -> None:
    code, _, err = in_process(*args)
    assert code == 2
    assert complaint in " ".join(err.split())


def test_a_receiver_that_others_can_reach_warns_unless_it_has_tls() -> None:
    process = spawn("receive", "0.0.0.0:0", "model:4M")
    assert process.stderr is not None
    warning = process.stderr.readline()
    process.kill()
    process.communicate()
    assert "whoever reaches 0.0.0.0:" in warning
    assert "consider --tls-cert" in warning


def test_an_address_in_use_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = in_process("receive", str(port), "model:4M")
    assert code == 1
    assert f"cannot listen at 127.0.0.1:{port}: Address already in use" in err
