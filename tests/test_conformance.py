"""Every conformance case gets libxenguest's verdict, or stands below with the reason why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migstream.engines.common import CheckpointAction, Missing, StreamType
from migstream.engines.restore import RestoreCallbacks, RestoreResult, restore
from migstream.errors import GuestError, MigstreamError, StreamError
from migstream.guests.model import ModelGuest
from migstream.guests.protocols import RestoredRings
from migstream.io import reader
from migstream.records import Record, libxc
from migstream.records.hvm_params import HvmParam
from migstream.records.libxc import GuestType

CASES = Path(__file__).parents[2] / "shared" / "conformance"
PAGES = 4096  # 16 MiB, which holds every page that a case brings
PAGES_A_MIB = 256
NOT_CALLED = "static_data_done-not-called"

#: Case -> what migstream does instead, and why.
DIFFERENCES: dict[int, tuple[str, str]] = {}


class StrictGuest(ModelGuest):
    """A model that refuses the values that a real hypervisor refuses."""

    MSRS = frozenset({0x0CE, 0x10A})
    has_context = False

    def apply(self, record: Record) -> None:
        if isinstance(record, libxc.X86MsrPolicy):
            for entry in record.msrs:
                if entry.idx not in self.MSRS:
                    raise GuestError(f"the hypervisor refuses MSR {entry.idx:#010x} of the policy")
        if isinstance(record, libxc.HvmParams):
            for param in record.params:
                if param.index > max(HvmParam):
                    raise GuestError(f"the hypervisor has no HVM parameter {param.index}")
        if isinstance(record, libxc.HvmContext):
            # An HVM context is save records of (type, instance, length); the first is the header, type 1.
            if record.hvm_ctx[:2] != b"\x01\x00":
                raise GuestError("the hypervisor refuses the HVM context: it has no header")
            self.has_context = True
        super().apply(record)

    def complete(self) -> RestoredRings:
        if self.guest_type is GuestType.HVM and not self.has_context:
            raise GuestError("the hypervisor refuses an empty HVM context")
        return super().complete()


def cases() -> list[Any]:
    if not (CASES / "cases.json").exists():
        return [pytest.param({}, marks=pytest.mark.skip(reason="../shared/conformance is not here"))]
    listed = json.loads((CASES / "cases.json").read_text())
    return [pytest.param(case, id=f"{case['n']:03}-{case['name']}") for case in listed]


def restored(case: dict[str, Any], notes: list[Missing]) -> RestoreResult:
    options = case["options"]
    make = StrictGuest if options.get("strict_hypervisor") else ModelGuest
    limit = options["max_mib"] * PAGES_A_MIB if "max_mib" in options else None
    target = make.empty(PAGES, GuestType[case["guest"].upper()], memory_limit=limit)

    def static_data_done(missing: Missing) -> int:
        notes.append(missing)
        return int(options.get("sdd_rc", 0))

    stream_type = StreamType(case["stream_type"])
    callbacks = RestoreCallbacks(static_data_done=static_data_done, checkpoint=_checkpoints(options))
    with reader.open(CASES / case["stream"]) as stream:
        return restore(target, stream, stream_type=stream_type, callbacks=callbacks)


def _checkpoints(options: dict[str, Any]) -> Callable[[], int]:
    met = 0

    def checkpoint() -> int:
        nonlocal met
        met += 1
        if met == options.get("error_at"):
            return CheckpointAction.ERROR
        return CheckpointAction.FAILOVER if met == options.get("failover_at") else CheckpointAction.CONTINUE

    return checkpoint


@pytest.mark.parametrize("case", cases())
def test_a_stream_gets_the_verdict_of_libxenguest(case: dict[str, Any]) -> None:
    notes: list[Missing] = []
    try:
        restored(case, notes)
        verdict, error = "accepted", None
    except MigstreamError as exc:
        verdict, error = "refused", exc
    if case["n"] in DIFFERENCES:
        assert verdict == DIFFERENCES[case["n"]][0]
        return
    expected = "refused" if case["verdict"] == "crashed" else case["verdict"]
    assert verdict == expected, error
    assert len(notes) <= 1, "static_data_done is called once"
    if case["verdict"] != "crashed":
        told = [str(m.name) for m in Missing if m & notes[0]] if notes else [NOT_CALLED]
        assert sorted(told) == sorted(case["missing"])
    if error is not None:
        assert isinstance(error, StreamError)
        assert error.offset is not None, "a refusal says its place"
