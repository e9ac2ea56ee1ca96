"""What migstream makes of a stream, to be held against what a target makes of it (``--differential``).

*Accept* means, for a target, exit code 0. For migstream there are two judges:

* ``verify``: the stream is sound, that is without a finding of severity error; warnings are accepted, as
  Xen's restore accepts them.
* ``restore``: the restore engine takes the stream to its end into a model guest. The guest is as large as the
  stream's highest PFN asks for, up to `MODEL_PAGES`; of a stream that asks for more there is no verdict.

Either way a verdict carries the ids of verify's rules that the stream breaks: the errors where it is refused,
in the order of the stream, and the warnings where it is accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from migstream.errors import MigstreamError
from migstream.fuzzing.target import Execution, Outcome
from migstream.fuzzing.triage import DISAGREEMENT, Signature, last_lines, python_frames
from migstream.text import decode, printable
from migstream.verification.rules import Severity

__all__ = ["JUDGES", "Judge", "Verdict", "disagreement", "own_failure"]

MODEL_PAGES = 1 << 20  # 4 GiB of guest, which takes memory only where the stream puts pages


@dataclass(frozen=True)
class Verdict:
    """What one of migstream's judges says: the rules broken, and the first of its reasons in words."""

    accepts: bool
    rules: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        rules = f" ({', '.join(self.rules)})" if self.rules else ""
        return f"migstream {'accepts' if self.accepts else 'refuses'}{rules}: {self.reason}"


Judge = Callable[[bytes], Verdict | None]


def _verify(octets: bytes) -> Verdict:
    from migstream.io import reader
    from migstream.verification import verify

    found = verify(reader.open_memory(octets))
    accepts = found.sound()
    grave = Severity.WARNING if accepts else Severity.ERROR
    findings = [finding for finding in found.findings if finding.severity is grave]
    rules = tuple(dict.fromkeys(finding.rule.id for finding in findings))
    reason = printable(str(findings[0])) if findings else "sound, without a finding"
    return Verdict(accepts, rules, reason)


def _restore(octets: bytes) -> Verdict | None:
    from migstream.engines.common import CheckpointAction, StreamType
    from migstream.engines.restore import RestoreCallbacks, read_guest_type, restore
    from migstream.guests.model import ModelGuest
    from migstream.inspection import Report, inspect
    from migstream.io import reader

    report = Report()
    for _ in inspect(reader.open_memory(octets), report):
        pass
    pages = (report.pages.total.highest or 0) + 1
    if pages > MODEL_PAGES:
        return None
    by_rules = _verify(octets)
    stream = reader.open_memory(octets)
    try:
        restore(
            ModelGuest.empty(max(pages, 1 << 12), read_guest_type(stream)),
            stream,
            stream_type=StreamType.REMUS if report.checkpoints else StreamType.PLAIN,
            callbacks=RestoreCallbacks(checkpoint=lambda: CheckpointAction.CONTINUE),
            spill_limit=64 << 20,
        )
    except MigstreamError as exc:
        return Verdict(False, () if by_rules.accepts else by_rules.rules, printable(str(exc)))
    return Verdict(True, by_rules.rules if by_rules.accepts else (), "restored into a model guest")


#: The judges by name. One says ``None`` where it has no verdict.
JUDGES: dict[str, Judge] = {"verify": _verify, "restore": _restore}


def disagreement(execution: Execution, verdict: Verdict | None, stream_path: str = "") -> Signature | None:
    """Return the signature where one accepts what the other refuses, else ``None``.

    What the target accepts wrongly is told apart by the first rule that it overlooks; what it refuses
    wrongly, by what it says. A crash, a hang or a want of memory is no verdict.
    """
    if verdict is None or execution.outcome not in (Outcome.ACCEPT, Outcome.REFUSE):
        return None
    accepts = execution.outcome is Outcome.ACCEPT
    if accepts == verdict.accepts:
        return None
    if accepts:
        return Signature(DISAGREEMENT, "target accepts", verdict.rules[:1] or ("restore",))
    said = last_lines(decode(execution.output), stream_path, 1)
    return Signature(DISAGREEMENT, "target refuses", (execution.ending, *said))


def own_failure(trace: str) -> Signature:
    """Return the signature of an exception in migstream itself, given its traceback."""
    exception, frames = python_frames(trace) or ("Exception", ())
    return Signature(DISAGREEMENT, f"migstream fails with {exception}", frames)
