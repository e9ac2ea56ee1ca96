"""Machines with an emulator: a libxl stream around the image, and targets that take the emulator over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import migstream
from migstream.engines.common import CheckpointAction, StreamType
from migstream.engines.machine import save_machine
from migstream.engines.restore import RestoreCallbacks, restore
from migstream.engines.save import SaveCallbacks, SaveResult, save
from migstream.errors import FormatError, GuestError
from migstream.guests.model import ModelGuest
from migstream.io.reader import open_memory
from migstream.records import Record
from migstream.records.libxc import GuestType
from migstream.records.libxl import EmulatorContext

PAGES = 64


class Emulated(ModelGuest):
    """A model with an emulator, whose state is a number that grows each time that it is asked for."""

    states = 0
    broken = False

    def emulator_records(self) -> Sequence[Record]:
        assert self.suspended
        if self.broken:
            raise GuestError("the emulator is gone")
        self.states += 1
        return [EmulatorContext(emulator_id=2, index=0, emulator_ctx=b"state %d" % self.states)]


class TakingOver(ModelGuest):
    """A model to restore to that takes an emulator over."""

    taken: tuple[Record, ...] = ()

    def take_emulator(self, record: Record) -> None:
        self.taken = (*self.taken, record)


def emulated() -> Emulated:
    guest = Emulated.booted(PAGES, GuestType.HVM)
    assert isinstance(guest, Emulated)
    return guest


def taking_over() -> TakingOver:
    guest = TakingOver.empty(PAGES, GuestType.HVM)
    assert isinstance(guest, TakingOver)
    return guest


def written(path: Path, write: Callable[[int], SaveResult]) -> tuple[bytes, SaveResult]:
    with path.open("wb") as out:
        result = write(out.fileno())
    return path.read_bytes(), result


def records(octets: bytes) -> list[str]:
    """Return layer and type of all records, pages once."""
    found: list[str] = []
    with open_memory(octets) as stream:
        for frame in stream:
            name = f"{frame.layer.name} {frame.ref.type}"
            if not found or found[-1] != name:
                found.append(name)
    return found


def remus(checkpoints: int) -> SaveCallbacks:
    left = iter(range(checkpoints - 1))
    return SaveCallbacks(checkpoint=lambda: 0 if next(left, None) is None else 1)


def test_a_guest_without_an_emulator_is_saved_as_ever(tmp_path: Path) -> None:
    one, _ = written(tmp_path / "one", lambda fd: save(ModelGuest.booted(PAGES, GuestType.HVM), fd))
    other, _ = written(
        tmp_path / "other", lambda fd: save_machine(ModelGuest.booted(PAGES, GuestType.HVM), fd)
    )
    assert one == other


def test_the_image_stands_in_a_libxl_stream_with_the_emulators_state_behind_it(tmp_path: Path) -> None:
    octets, result = written(tmp_path / "stream", lambda fd: save_machine(emulated(), fd, live=True))
    assert octets[:16] == b"LibxlFmt" + bytes([0, 0, 0, 2, 0, 0, 0, 0])
    assert octets[16:24] == bytes([1, 0, 0, 0, 0, 0, 0, 0])  # LIBXC_CONTEXT, no body
    assert octets[-32:] == (
        bytes([3, 0, 0, 0, 15, 0, 0, 0])  # EMULATOR_CONTEXT of 15 octets
        + bytes([2, 0, 0, 0, 0, 0, 0, 0])  # QEMU upstream, index 0
        + b"state 1\0"  # and a zero of padding
        + bytes(8)  # END
    )
    assert result.octets == len(octets)
    with open_memory(octets) as stream:
        assert not [f for f in migstream.verify(stream).findings if f.rule.severity == "error"]


def test_each_checkpoint_has_a_state_and_the_last_complete_one_is_taken_over(tmp_path: Path) -> None:
    octets, _ = written(
        tmp_path / "stream",
        lambda fd: save_machine(emulated(), fd, stream_type=StreamType.REMUS, callbacks=remus(3)),
    )
    assert records(octets)[-2:] == ["libxl EMULATOR_CONTEXT", "libxl CHECKPOINT_END"]
    target = taking_over()
    with (tmp_path / "stream").open("r+b") as stream:
        stream.truncate(len(octets) - 4)  # the sender died before the third checkpoint was complete
        result = restore(
            target,
            stream.fileno(),
            stream_type=StreamType.REMUS,
            callbacks=RestoreCallbacks(checkpoint=lambda: CheckpointAction.CONTINUE),
        )
    assert result.checkpoints == 2
    assert [record.emulator_ctx for record in target.taken if isinstance(record, EmulatorContext)] == [
        b"state 2"
    ]


def test_a_target_takes_over_more_than_is_kept_for_others(tmp_path: Path) -> None:
    class Big(Emulated):
        def emulator_records(self) -> Sequence[Record]:
            return [EmulatorContext(emulator_id=2, index=0, emulator_ctx=bytes(2 << 20))]

    source = Big.booted(PAGES, GuestType.HVM)
    written(tmp_path / "stream", lambda fd: save_machine(source, fd))
    target = taking_over()
    with (tmp_path / "stream").open("rb") as stream:
        restore(target, stream.fileno())
    assert [record.emulator_ctx for record in target.taken if isinstance(record, EmulatorContext)] == [
        bytes(2 << 20)
    ]


def test_a_state_that_is_too_large_to_be_taken_over_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migstream.engines.restore_report.TAKEN_TOTAL", 10)
    written(tmp_path / "stream", lambda fd: save_machine(emulated(), fd))
    with (
        (tmp_path / "stream").open("rb") as stream,
        pytest.raises(FormatError, match="of more than 10 octets"),
    ):
        restore(taking_over(), stream.fileno())


def test_a_guest_whose_emulator_fails_runs_on(tmp_path: Path) -> None:
    guest = emulated()
    guest.broken = True
    with pytest.raises(GuestError, match="the emulator is gone"):
        written(tmp_path / "stream", lambda fd: save_machine(guest, fd))
    assert not guest.suspended


def test_a_machine_is_no_primary_of_colo() -> None:
    with pytest.raises(GuestError, match="choose plain or remus"):
        save_machine(emulated(), 1, stream_type=StreamType.COLO)
