"""What a save is told and tells, by properties: policies, rates, progress."""

from __future__ import annotations

import io
import json
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migstream.engines.channel import TokenBucket
from migstream.engines.policies import POLICIES, Decision, PrecopyStats, parse_policies
from migstream.engines.progress import PassKind, PassLog, PassReport, PassStart, show

QUICK = settings(max_examples=60, deadline=None)

sound_texts = st.sampled_from(
    [
        ("xen", ""),
        ("max-iterations", "3"),
        ("min-remaining", "50"),
        ("max-downtime", "300ms"),
        ("converge", ""),
        ("converge", "1"),
    ]
)
any_texts = st.tuples(
    st.one_of(st.sampled_from([*POLICIES, "no-such"]), st.text(max_size=5)),
    st.one_of(st.sampled_from(["", "3", "300ms", "1.5s", "x", "-1"]), st.text(max_size=5)),
)
stats = st.lists(
    st.builds(
        PrecopyStats,
        st.integers(0, 9),
        st.integers(0, 1 << 20),
        st.integers(-1, 500),
        st.one_of(st.none(), st.floats(1, 1e9)),
        st.one_of(st.none(), st.floats(0, 1e9)),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(sound_texts, max_size=3) | st.lists(any_texts, min_size=1, max_size=3), stats)
def test_any_text_is_a_policy_that_answers_or_an_error_that_says_what_was_expected(
    texts: list[tuple[str, str]], asked: list[PrecopyStats]
) -> None:
    written = [f"{name}={value}" if value else name for name, value in texts]
    try:
        policy = parse_policies(written)
    except ValueError:
        with pytest.raises(ValueError, match=r"there is no policy|expected|takes no value"):
            parse_policies(written)
        return
    assert {policy(each) for each in asked} <= set(Decision)
    assert policy(PrecopyStats(1 << 40, 0, 0, 1.0, 0.0)) is Decision.STOP_AND_COPY


@QUICK
@given(st.integers(1, 4), st.lists(st.sampled_from(["loses", "wins", "is not known"]), max_size=20))
def test_a_save_is_given_up_when_it_loses_so_many_rounds_in_a_row(rounds: int, story: list[str]) -> None:
    policy = parse_policies([f"converge={rounds}", "max-iterations=100"])
    rates = {"loses": (1.0, 2.0), "wins": (2.0, 1.0), "is not known": (None, None)}
    known = ""
    for iteration, outcome in enumerate(story):
        answer = policy(PrecopyStats(iteration, 0, 50, *rates[outcome]))
        known += {"loses": "l", "wins": "w", "is not known": ""}[outcome]
        given_up = outcome == "loses" and known.endswith("l" * rounds)
        assert (answer is Decision.ABORT) == given_up


@QUICK
@given(st.floats(1, 1e9), st.lists(st.tuples(st.floats(0, 2), st.integers(0, 1 << 20)), max_size=20))
def test_a_rate_is_never_exceeded_by_more_than_its_burst(rate: float, steps: list[tuple[float, int]]) -> None:
    now, passed = 0.0, 0

    def sleep(seconds: float) -> None:
        nonlocal now
        assert seconds > 0
        now += seconds

    with pytest.raises(ValueError, match="more than 0 octets"):
        TokenBucket(-rate)
    bucket = TokenBucket(rate, clock=lambda: now, sleep=sleep)
    for idle, octets in steps:
        now += idle
        bucket.take(octets)
        passed += octets
        assert passed <= rate * (now + 0.05) * 1.000001 + 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


rates = st.one_of(st.none(), st.floats(0, 1e12))
passes = st.lists(
    st.tuples(
        st.sampled_from(get_args(PassKind)),
        st.one_of(st.none(), st.integers(0, 1 << 30)),
        rates,
        rates,
        st.floats(0, 1e5),
        st.lists(st.integers(0, 1024), max_size=3),
    ),
    max_size=4,
)


@pytest.mark.parametrize("way", ["json", "terminal", "file"])
@settings(max_examples=25, deadline=None)
@given(told=passes)
def test_any_passes_are_shown_a_line_each_but_checkpoints_on_a_terminal(way: str, told: list[tuple]) -> None:  # type: ignore[type-arg]  # as drawn
    out = Terminal() if way == "terminal" else io.StringIO()
    reports = []
    with show(out, as_json=way == "json") as inner:
        progress = PassLog(inner)
        for number, (kind, pages, dirty, downtime, seconds, batches) in enumerate(told):
            progress.begin(PassStart(kind, number, pages, dirty, downtime))
            for batch in batches:
                progress.advance(batch, batch * 4096)
            done = sum(batches)
            reports.append(PassReport(kind, number, done, done * 4096, seconds, dirty, downtime))
            progress.end(reports[-1])
    assert progress.reports == reports
    if way == "json":
        lines = [json.loads(line) for line in out.getvalue().splitlines()]
        assert lines == [{"event": "pass", **report.to_json()} for report in reports]
    elif way == "terminal":
        for report in reports:
            line = f"{report.kind} {report.number}: {report.pages} pages"
            assert (line in out.getvalue()) == (report.kind != "checkpoint")
    else:
        assert out.getvalue() == ""
