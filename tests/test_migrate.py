"""Save against restore: what arrives is the guest as it was suspended, whatever happens on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migstream.cli.demo import command as demo
from migstream.cli.migrate import command as migrate_command
from migstream.cli.save import command as save_command
from migstream.engines.channel import ChannelError
from migstream.engines.common import StreamType
from migstream.engines.migrate import MigrateResult, Transport, migrate
from migstream.engines.policies import (
    Decision,
    PrecopyPolicy,
    PrecopyStats,
    first_of,
    max_iterations,
    min_remaining,
)
from migstream.engines.restore import Outcome, RestoreCallbacks, RestoreResult, restore
from migstream.engines.save import SaveCallbacks, SaveError, SaveResult, owning, save
from migstream.errors import GuestError, StreamError, UnsettledError
from migstream.guests.compare import content_equal, differing_pfns, differing_records
from migstream.guests.model import ModelGuest
from migstream.guests.workload import Workload
from migstream.io.outputs import new_file
from migstream.records.libxc import GuestType

SLOW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])

guest_types = st.sampled_from([GuestType.HVM, GuestType.PV])
policies = st.one_of(
    st.none(),
    st.integers(0, 8).map(max_iterations),
    st.builds(
        lambda pages, rounds: first_of(min_remaining(pages), max_iterations(rounds)),
        st.integers(0, 200),
        st.integers(1, 6),
    ),
)


def go_on() -> int:
    return 1


RECEIVES = RestoreCallbacks(
    checkpoint=go_on,
    postcopy=go_on,
    wait_checkpoint=go_on,
    suspend=go_on,
    restore_results=lambda store, console: None,
)


class BusyGuest:
    """A model whose workload takes a step whenever the policy is asked: between passes, deterministically."""

    def __init__(self, guest_type: GuestType, *, seed: int = 0, pages: int = 600, writes: int = 200) -> None:
        self.source = ModelGuest.booted(pages, guest_type, seed=seed)
        self.target = ModelGuest.empty(pages, guest_type, seed=seed + 1)
        self.workload = Workload(self.source, seed=seed, working_set=pages // 2, turmoil=0.5)
        self.writes = writes

    def policy(self, inner: PrecopyPolicy | None) -> PrecopyPolicy:
        def busy(stats: PrecopyStats) -> Decision:
            if self.writes:
                self.workload.step(self.writes)
            return (inner or max_iterations(3))(stats)

        return busy

    def migrate(
        self,
        *,
        stream_type: StreamType = StreamType.PLAIN,
        live: bool = True,
        policy: PrecopyPolicy | None = None,
        postcopy: Callable[[], int] | None = None,
        checkpoint: Callable[[], int] | None = None,
        batch_size: int = 1024,
        transport: Transport = Transport.PIPE,
        debug: bool = False,
    ) -> MigrateResult:
        callbacks = SaveCallbacks(
            precopy_policy=self.policy(policy),
            postcopy=postcopy,
            checkpoint=go_on if stream_type is StreamType.COLO else checkpoint,
            wait_checkpoint=checkpoint,
        )

        def send(fd: int, recv_fd: int) -> SaveResult:
            return save(
                self.source,
                fd,
                live=live,
                stream_type=stream_type,
                callbacks=callbacks,
                recv_fd=recv_fd,
                batch_size=batch_size,
                debug=debug,
            )

        def receive(fd: int, send_back_fd: int) -> RestoreResult:
            return restore(
                self.target,
                fd,
                stream_type=stream_type,
                callbacks=RECEIVES,
                send_back_fd=send_back_fd,
                verify_fails=debug,
            )

        return migrate(self.source, send, receive, transport=transport)

    def difference(self) -> list[str]:
        pages = [f"PFN {pfn:#x}" for pfn in differing_pfns(self.source, self.target).tolist()]
        return pages + differing_records(self.source, self.target)


@SLOW
@given(guest_types, st.integers(0, 1 << 16), policies, st.sampled_from([3, 64, 1024]), st.integers(0, 400))
def test_a_live_migration_delivers_the_guest_as_it_was_suspended(
    guest_type: GuestType, seed: int, policy: PrecopyPolicy | None, batch_size: int, writes: int
) -> None:
    guest = BusyGuest(guest_type, seed=seed, writes=writes)
    result = guest.migrate(policy=policy, batch_size=batch_size)
    assert guest.source.suspended
    assert guest.difference() == []
    assert result.restore.result is Outcome.RESTORED
    assert result.restore.pages == result.save.pages


@pytest.mark.parametrize("guest_type", list(GuestType))
@pytest.mark.parametrize("transport", list(Transport))
def test_every_transport_carries_every_guest(guest_type: GuestType, transport: Transport) -> None:
    guest = BusyGuest(guest_type)
    guest.migrate(transport=transport)
    assert guest.difference() == []


@pytest.mark.parametrize("guest_type", list(GuestType))
def test_a_guest_that_stands_still_is_sent_once(guest_type: GuestType) -> None:
    guest = BusyGuest(guest_type)
    result = guest.migrate(live=False)
    assert guest.difference() == []
    assert result.save.iterations == 0


@pytest.mark.parametrize("guest_type", list(GuestType))
def test_debug_compares_all_memory_and_finds_it_equal(guest_type: GuestType) -> None:
    guest = BusyGuest(guest_type)
    result = guest.migrate(debug=True)
    assert guest.difference() == []
    assert (result.restore.verify_mismatch_count, result.save.warnings) == (0, [])


def test_a_guest_that_a_thread_keeps_busy_arrives_whole() -> None:
    for guest_type in GuestType:
        guest = BusyGuest(guest_type, pages=8192, writes=0)
        guest.workload.pages_per_second = 500_000
        with guest.workload:
            result = guest.migrate()
            assert guest.difference() == []
        assert result.save.iterations > 0


@pytest.mark.parametrize(("error", "runs_on"), [(GuestError, True), (UnsettledError, False)])
def test_a_guest_that_may_run_elsewhere_is_not_resumed(error: type[Exception], runs_on: bool) -> None:
    source = ModelGuest.booted(300)

    def hand_over() -> None:
        with owning(source):
            source.suspend()
            raise error

    with pytest.raises(error):
        hand_over()
    assert source.suspended != runs_on


# Checkpoints


@SLOW
@given(
    guest_types,
    st.sampled_from([StreamType.REMUS, StreamType.COLO]),
    st.integers(0, 1 << 16),
    st.lists(st.integers(0, 300), min_size=1, max_size=5),
)
def test_a_checkpointed_stream_that_ends_delivers_the_last_checkpoint(
    guest_type: GuestType, stream_type: StreamType, seed: int, writes: list[int]
) -> None:
    guest = BusyGuest(guest_type, seed=seed)
    steps = list(writes)

    def postcopy() -> int:
        if steps:
            guest.source.resume()
        return len(steps)  # 0 ends it, and leaves the guest as it was sent

    def checkpoint() -> int:
        guest.workload.step(steps.pop())
        return 1

    result = guest.migrate(stream_type=stream_type, postcopy=postcopy, checkpoint=checkpoint)
    assert (result.save.checkpoints, result.restore.checkpoints) == (len(writes) + 1, len(writes) + 1)
    assert result.restore.result is Outcome.FAILED_OVER
    assert guest.difference() == []


@SLOW
@given(guest_types, st.integers(0, 1 << 16), st.integers(1, 3), st.data())
def test_a_sender_that_dies_anywhere_leaves_the_last_complete_checkpoint_or_a_clean_error(
    guest_type: GuestType, seed: int, last: int, data: st.DataObject
) -> None:
    """The stream is cut at any octet; the target has to equal the source as it was at a checkpoint."""
    guest = BusyGuest(guest_type, seed=seed, pages=300, writes=50)
    complete_at: list[int] = []
    images: list[ModelGuest] = []
    stream = os.memfd_create("stream")

    def postcopy() -> int:
        complete_at.append(os.fstat(stream).st_size)
        images.append(ModelGuest.empty(300, guest_type, seed=99))
        os.lseek(stream, 0, os.SEEK_SET)
        restore(images[-1], stream, stream_type=StreamType.REMUS, callbacks=RECEIVES)
        os.lseek(stream, 0, os.SEEK_END)
        assert content_equal(guest.source, images[-1])
        guest.source.resume()
        guest.workload.step(50)
        return 1 if len(images) <= last else 0

    callbacks = SaveCallbacks(precopy_policy=guest.policy(None), postcopy=postcopy, checkpoint=go_on)
    save(guest.source, stream, stream_type=StreamType.REMUS, callbacks=callbacks)
    cut = data.draw(
        st.one_of(st.integers(0, complete_at[-1]), st.sampled_from(complete_at).map(lambda at: at - 1))
    )
    os.ftruncate(stream, cut)
    os.lseek(stream, 0, os.SEEK_SET)
    complete = sum(at <= cut for at in complete_at)
    if complete == 0:
        with pytest.raises(StreamError):
            restore(guest.target, stream, stream_type=StreamType.REMUS, callbacks=RECEIVES)
    else:
        result = restore(guest.target, stream, stream_type=StreamType.REMUS, callbacks=RECEIVES)
        assert (result.result, result.checkpoints) == (Outcome.FAILED_OVER, complete)
        assert content_equal(guest.target, images[complete - 1])
    os.close(stream)


# Faults


@SLOW
@given(guest_types, st.booleans(), st.integers(0, 3 << 20))
def test_a_receiver_that_goes_away_anywhere_leaves_the_source_running(
    guest_type: GuestType, live: bool, octets: int
) -> None:
    guest = BusyGuest(guest_type)

    def receive(fd: int, _: int) -> RestoreResult:
        left = octets
        while left > 0 and (piece := os.read(fd, min(left, 1 << 16))):
            left -= len(piece)
        raise GuestError("the receiving host is on fire")

    with pytest.raises((GuestError, ChannelError)):
        migrate(
            guest.source,
            lambda fd, _: save(
                guest.source, fd, live=live, callbacks=SaveCallbacks(precopy_policy=guest.policy(None))
            ),
            receive,
        )
    assert not guest.source.suspended
    guest.workload.step(10)  # and it really runs: a suspended guest refuses


def test_a_restore_that_is_refused_is_the_error_that_is_told_and_not_the_broken_pipe() -> None:
    guest = BusyGuest(GuestType.HVM, pages=8192)
    guest.target = ModelGuest.empty(8000, GuestType.HVM)
    with pytest.raises(StreamError, match=r"PFN 0x1f40 is above the target's highest"):
        guest.migrate()
    assert not guest.source.suspended


def test_a_save_that_is_aborted_is_the_error_that_is_told_and_not_the_truncated_stream() -> None:
    guest = BusyGuest(GuestType.HVM)
    with pytest.raises(SaveError, match="policy broke the save off"):
        guest.migrate(policy=lambda _: Decision.ABORT)
    assert not guest.source.suspended


def test_a_guest_of_the_other_type_is_refused_before_any_page() -> None:
    guest = BusyGuest(GuestType.HVM)
    guest.target = ModelGuest.empty(600, GuestType.PV)
    with pytest.raises(StreamError, match=r"HVM.*PV|PV.*HVM"):
        guest.migrate()
    assert not guest.target.populated(np.arange(600, dtype=np.uint64)).any()


def test_a_migration_that_fails_leaves_no_descriptor_and_no_thread_behind() -> None:
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        guest = BusyGuest(GuestType.HVM)
        with pytest.raises(SaveError):
            guest.migrate(policy=lambda _: Decision.ABORT, transport=Transport.TCP)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


# Files that appear when they are complete


def test_a_new_file_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(b"old")
    with new_file(path) as fd:
        os.write(fd, b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["stream"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ChannelError, SystemExit])
def test_a_failure_leaves_no_new_file_and_the_old_one_untouched(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    path = tmp_path / "stream"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with new_file(path) as fd:
            os.write(fd, b"new")
            raise failure

    with pytest.raises(failure):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["stream"]


def test_a_new_file_has_the_rights_that_the_umask_leaves_it(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        with new_file(tmp_path / "stream"):
            pass
    finally:
        os.umask(mask)
    assert (tmp_path / "stream").stat().st_mode & 0o777 == 0o640


def test_a_link_is_followed_and_a_directory_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_file(tmp_path / "link") as fd:
        os.write(fd, b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"x"
    with pytest.raises(IsADirectoryError), new_file(tmp_path):
        pass


# Commands


def run(command: object, *args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(command, args)  # type: ignore[arg-type]  # a click.Command, untyped in the table
    return result.exit_code, result.stdout, result.stderr


def test_save_writes_a_file_and_one_json_object_a_pass(tmp_path: Path) -> None:
    out = tmp_path / "guest.img"
    code, stdout, stderr = run(save_command, "model:4M,busy=1000", str(out), "--live", "--json")
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert (code, stderr) == (0, "")
    assert lines[0]["kind"] == "precopy"
    assert {line["event"] for line in lines[:-1]} == {"pass"}
    end = lines[-1]
    assert (end["event"], end["result"], end["octets"]) == ("result", "saved", out.stat().st_size)


def test_a_save_that_fails_leaves_no_file_and_says_so_in_its_last_line(tmp_path: Path) -> None:
    code, stdout, stderr = run(save_command, "model:4M,suspend=refuse", str(tmp_path / "x"), "--json")
    assert code == 1
    end = json.loads(stdout.splitlines()[-1])
    assert (end["result"], end["error"]["message"]) == (
        "failed",
        "the guest is still running: it refused to suspend",
    )
    assert "refused to suspend" in stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["model:4M", "x", "--policy", "fastest"], "there is no policy 'fastest'"),
        (["model:4M", "x", "--bandwidth", "fast"], "expected octets a second such as 100M"),
        (["model:4M", "x", "--bandwidth", "0"], "expected octets a second such as 100M"),
        (["model:4M", "x", "--type", "colo"], "--type colo needs --back-channel"),
        (["model:4M", "x", "--type", "remus"], "--type remus into a file needs --checkpoints N"),
        (["model:4M", "fd:x"], "expected fd:N"),
    ],
)
def test_wrong_usage_of_save_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, stderr = run(save_command, *args)
    assert code == 2
    assert complaint in stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("guest_type", ["hvm", "pv"])
@pytest.mark.parametrize(
    ("options", "outcome"),
    [
        ([], "restored"),
        (["--stopped", "--tcp"], "restored"),
        (["--socket", "--policy", "max-iterations=2", "--debug"], "restored"),
        (["--type", "remus", "--checkpoints", "3", "--interval", "1"], "failed_over"),
        (["--type", "colo", "--checkpoints", "2", "--interval", "1"], "failed_over"),
    ],
)
def test_migrate_tells_what_became_of_the_guest(guest_type: str, options: list[str], outcome: str) -> None:
    code, stdout, stderr = run(
        migrate_command, "model:4M,busy=5000", "model:4M", "--guest-type", guest_type, "--json", *options
    )
    assert (code, stderr) == (0, "")
    end = json.loads(stdout.splitlines()[-1])
    assert (end["result"], end["missing"], end["error"]) == (outcome, [], None)


def test_migrate_fails_with_the_receivers_message() -> None:
    code, stdout, stderr = run(migrate_command, "model:8M", "model:4M", "--json")
    assert code == 1
    assert json.loads(stdout.splitlines()[-1])["error"]["record"]["type"] == "PAGE_DATA"
    assert "PFN 0x400 is above the target's highest" in stderr


@pytest.mark.parametrize("guest_type", ["hvm", "pv"])
def test_demo_shows_that_the_machines_are_equal(guest_type: str) -> None:
    code, stdout, _ = run(demo, "--size", "8", "--guest-type", guest_type, "--seed", "7")
    assert code == 0
    assert "2,048 pages compared: 0 differ\nthe machines are equal\n" in stdout


def test_demo_fails_when_a_page_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(target: ModelGuest, fd: int) -> RestoreResult:
        result = restore(target, fd)
        target.memory.words[5, 3] ^= np.uint64(1)
        return result

    monkeypatch.setattr("migstream.engines.restore.restore", spoil)
    code, stdout, _ = run(demo, "--size", "8")
    assert code == 1
    assert "1 differ\n  PFN 0x5 differs\n" in stdout


def test_an_interrupt_ends_save_without_a_file_and_without_a_traceback(tmp_path: Path) -> None:
    program = "from migstream.cli.save import command; command()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "model:64M", str(tmp_path / "x"), "--bandwidth", "1M"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not os.listdir(tmp_path):  # until it has begun to write
        assert process.poll() is None
    process.send_signal(2)
    _, stderr = process.communicate()
    assert process.returncode not in (0, -2)
    assert "Traceback" not in stderr
    assert os.listdir(tmp_path) == []
