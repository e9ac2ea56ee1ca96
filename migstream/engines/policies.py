"""When precopy ends: policies that a live save asks before and after every pass, by name or as functions.

A policy is a function from `PrecopyStats` to a `Decision`. It is asked twice a round, as Xen asks its own
(tools/libs/guest/xg_sr_save.c, send_memory_live): once with the number of pages that are dirty now, which
are about to be sent, and once behind the pass, when that number is not known (-1).

    policy = first_of(max_downtime(0.3), converge(), max_iterations(30))
    save(guest, fd, live=True, callbacks=SaveCallbacks(precopy_policy=policy))
    migstream save model:1G out --live --policy max-downtime=300ms --policy converge
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

__all__ = [
    "POLICIES",
    "Decision",
    "NamedPolicy",
    "PrecopyPolicy",
    "PrecopyStats",
    "converge",
    "first_of",
    "max_downtime",
    "max_iterations",
    "min_remaining",
    "parse_policies",
    "xen_default",
]

XEN_MAX_ITERATIONS = 5  # SPP_MAX_ITERATIONS
XEN_MIN_REMAINING = 50  # pages, SPP_TARGET_DIRTY_COUNT
LOSING_ROUNDS = 3  # one round may be a burst; three in a row are a workload


class Decision(IntEnum):
    """What a policy may answer (``XGS_POLICY_*`` of tools/include/xenguest.h)."""

    ABORT = -1
    CONTINUE_PRECOPY = 0
    STOP_AND_COPY = 1


@dataclass(frozen=True)
class PrecopyStats:
    """What a policy decides on: Xen's three numbers (``struct precopy_stats``) and two measured rates.

    ``dirty_count`` is in pages, -1 while it is not known. ``bandwidth`` is what the channel took so far,
    in octets a second; ``dirty_rate`` what the guest wrote to during the last round, in octets a
    second. Both are ``None`` until there is something to measure.
    """

    iteration: int
    total_written: int
    dirty_count: int
    bandwidth: float | None = None
    dirty_rate: float | None = None
    page_size: int = 4096

    @property
    def downtime_s(self) -> float | None:
        """How long the guest would stand still if it were stopped now, in seconds, if that is known."""
        if self.dirty_count < 0 or not self.bandwidth:
            return None
        return self.dirty_count * self.page_size / self.bandwidth


PrecopyPolicy = Callable[[PrecopyStats], Decision]


def xen_default(stats: PrecopyStats) -> Decision:
    """Stop after 5 rounds, or when fewer than 50 pages are dirty: what Xen does unless told otherwise."""
    few = 0 <= stats.dirty_count < XEN_MIN_REMAINING
    return _stop_if(few or stats.iteration >= XEN_MAX_ITERATIONS)


def max_iterations(rounds: int) -> PrecopyPolicy:
    """Stop after ``rounds`` rounds."""
    return lambda stats: _stop_if(stats.iteration >= rounds)


def min_remaining(pages: int) -> PrecopyPolicy:
    """Stop when fewer than ``pages`` pages are dirty."""
    return lambda stats: _stop_if(0 <= stats.dirty_count < pages)


def max_downtime(seconds: float) -> PrecopyPolicy:
    """Stop when the dirty pages can be sent within ``seconds``, going by the bandwidth measured so far."""

    def policy(stats: PrecopyStats) -> Decision:
        return _stop_if(stats.downtime_s is not None and stats.downtime_s <= seconds)

    return policy


def converge(rounds: int = LOSING_ROUNDS) -> PrecopyPolicy:
    """Abort when the guest dirties memory faster than it can be sent, ``rounds`` rounds in a row."""
    losing = 0

    def policy(stats: PrecopyStats) -> Decision:
        nonlocal losing
        if stats.iteration == 0:
            losing = 0  # a new save
        if stats.dirty_count < 0 or stats.bandwidth is None or stats.dirty_rate is None:
            return Decision.CONTINUE_PRECOPY
        losing = losing + 1 if stats.dirty_rate > stats.bandwidth else 0
        return Decision.ABORT if losing >= rounds else Decision.CONTINUE_PRECOPY

    return policy


def first_of(*policies: PrecopyPolicy) -> PrecopyPolicy:
    """Ask ``policies`` in turn; the first that does not want to continue decides. All are always asked."""

    def policy(stats: PrecopyStats) -> Decision:
        answers = [each(stats) for each in policies]
        return next((a for a in answers if a is not Decision.CONTINUE_PRECOPY), Decision.CONTINUE_PRECOPY)

    return policy


def _stop_if(condition: bool) -> Decision:
    return Decision.STOP_AND_COPY if condition else Decision.CONTINUE_PRECOPY


# By name


@dataclass(frozen=True)
class NamedPolicy:
    """A policy as a user writes it: ``name=VALUE``, the value in the form that ``value`` names.

    ``ends_precopy``: whether it ever lets a guest be stopped, and not only aborts.
    """

    make: Callable[[str], PrecopyPolicy]
    value: str
    help: str
    ends_precopy: bool = True


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"expected a whole number, found {text!r}")
    return int(text)


_SECONDS = {"ms": 1e-3, "s": 1.0, "": 1.0}


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|)", text, re.ASCII)
    if match is None:
        raise ValueError(f"expected a time such as 300ms or 1.5s, found {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


def _no_value(text: str) -> PrecopyPolicy:
    if text:
        raise ValueError(f"takes no value, found {text!r}")
    return xen_default


POLICIES: dict[str, NamedPolicy] = {
    "xen": NamedPolicy(_no_value, "", "stop after 5 rounds or below 50 dirty pages (Xen's own, the default)"),
    "max-iterations": NamedPolicy(lambda text: max_iterations(_count(text)), "N", "stop after N rounds"),
    "min-remaining": NamedPolicy(
        lambda text: min_remaining(_count(text)), "PAGES", "stop when fewer than PAGES pages are dirty"
    ),
    "max-downtime": NamedPolicy(
        lambda text: max_downtime(_duration(text)),
        "TIME",
        "stop when the dirty pages can be sent within TIME (300ms, 1.5s) at the measured bandwidth",
    ),
    "converge": NamedPolicy(
        lambda text: converge(_count(text) if text else LOSING_ROUNDS),
        "[ROUNDS]",
        f"abort when memory is dirtied faster than sent, {LOSING_ROUNDS} (or ROUNDS) rounds in a row",
        ends_precopy=False,
    ),
}


def parse_policies(texts: Iterable[str]) -> PrecopyPolicy:
    """Make one policy of ``name=value`` texts, each of which may hold several, separated by commas.

    Xen's default is put behind them when none of them would ever end precopy. Raises `ValueError`, which
    says what was expected, for an unknown name or a value that does not fit it.
    """
    parts = [part.strip().partition("=") for text in texts for part in text.split(",") if part.strip()]
    policies = [_make(name, value) for name, _, value in parts]
    if not any(POLICIES[name].ends_precopy for name, _, _ in parts):
        policies.append(xen_default)
    return first_of(*policies)


def _make(name: str, value: str) -> PrecopyPolicy:
    if name not in POLICIES:
        raise ValueError(f"there is no policy {name!r}; there are {', '.join(POLICIES)}")
    try:
        return POLICIES[name].make(value)
    except ValueError as exc:
        raise ValueError(f"policy {name}: {exc}") from None
