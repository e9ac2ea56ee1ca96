"""A finding run again: does it still come?"""

from __future__ import annotations

import os
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

from migstream.fuzzing.findings import Finding, load_finding
from migstream.fuzzing.target import Execution, Target, TargetError
from migstream.fuzzing.triage import Signature, signature_of
from migstream.fuzzing.verdicts import JUDGES, Verdict, disagreement
from migstream.text import printable

__all__ = ["Replay", "replay"]


@dataclass(frozen=True)
class Replay:
    """What came of a finding's stream this time. ``again``: the same finding."""

    finding: Finding
    execution: Execution
    verdict: Verdict | None
    signature: Signature | None

    @property
    def again(self) -> bool:
        """Whether the signature is the finding's."""
        return self.signature == self.finding.signature

    def text(self) -> str:
        """Return it in words, the target's output first."""
        lines = [printable(line.expandtabs()) for line in self.execution.output.splitlines()]
        lines.append(f"{self.execution.outcome}, {self.execution.ending}, {self.execution.seconds:.2f} s")
        if self.verdict is not None:
            lines.append(str(self.verdict))
        if self.again:
            lines.append(f"it came again: {self.signature}")
        elif self.signature is None:
            lines.append(f"it did not come again: {self.finding.signature}")
        else:
            lines.append(f"another finding: {self.signature}, not {self.finding.signature}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """Return outcome, output and signature."""
        return {
            "again": self.again,
            "outcome": str(self.execution.outcome),
            "ending": self.execution.ending,
            "seconds": round(self.execution.seconds, 3),
            "output": self.execution.output.decode("latin-1"),
            "verdict": None if self.verdict is None else str(self.verdict),
            "signature": None if self.signature is None else self.signature.to_json(),
            "expected": self.finding.signature.to_json(),
        }


def replay(folder: Path) -> Replay:
    """Run a finding's target on its stream, where the campaign ran it.

    Raises `FindingError`, `TargetError` where its target cannot be run, `OSError`.
    """
    finding = load_finding(folder)
    if not os.path.isdir(finding.directory):
        raise TargetError(
            f"the campaign ran in {finding.directory}, which is gone; make it, or use replay.sh"
        )
    with chdir(finding.directory):
        finding.command.check()
        with Target(finding.command) as target:
            execution = target.run(finding.stream)
            path = str(target.stream_path)
    signature = signature_of(execution, path)
    verdict = None
    if signature is None and finding.judge is not None:
        verdict = JUDGES[finding.judge](finding.stream)
        signature = disagreement(execution, verdict, path)
    return Replay(finding, execution, verdict, signature)
