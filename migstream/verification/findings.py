"""Findings: one broken rule at one place, and the verdict that they add up to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from migstream.errors import RecordRef
from migstream.verification.rules import RULES, Rule, Severity

__all__ = ["Finding", "Verdict"]

KEPT_PER_RULE = 100  # findings of one rule that are kept whole; more are counted only


@dataclass(frozen=True)
class Finding:
    """One rule broken (or a note) at one place of the stream."""

    rule: Rule
    message: str
    offset: int
    layer: str | None
    record: RecordRef | None

    @property
    def severity(self) -> Severity:
        """The rule's."""
        return self.rule.severity

    def to_json(self) -> dict[str, object]:
        """Return the finding as `migstream verify --json` prints it."""
        return {
            "rule": self.rule.id,
            "severity": str(self.severity),
            "offset": self.offset,
            "layer": self.layer,
            "record": self.record.to_json() if self.record else None,
            "message": self.message,
            "reference": self.rule.reference,
        }

    def __str__(self) -> str:
        place = f"offset {self.offset} (0x{self.offset:x})"
        if self.record is not None:
            place += f", {self.layer} record {self.record.index} {self.record.type}"
        elif self.layer is not None:
            place += f", layer {self.layer}"
        return f"{self.severity} {self.rule.id} at {place}: {self.message}"


@dataclass
class Verdict:
    """What verify found. Of each rule the first findings are kept whole, all are counted."""

    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(
        self,
        rule_id: str,
        message: str,
        *,
        offset: int,
        layer: str | None,
        record: RecordRef | None = None,
    ) -> None:
        """Add a finding of the rule ``rule_id``."""
        self.counts[rule_id] += 1
        if self.counts[rule_id] <= KEPT_PER_RULE:
            self.findings.append(Finding(RULES[rule_id], message, offset, layer, record))

    def count(self, severity: Severity) -> int:
        """Return how many findings of this severity there are, kept or not."""
        return sum(n for rule_id, n in self.counts.items() if RULES[rule_id].severity is severity)

    @property
    def omitted(self) -> int:
        """How many findings were counted but not kept."""
        return self.counts.total() - len(self.findings)

    def sound(self, *, strict: bool = False) -> bool:
        """Whether there is no error; with ``strict``, no warning either."""
        return not self.count(Severity.ERROR) and not (strict and self.count(Severity.WARNING))
