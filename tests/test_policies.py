"""When precopy ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream.engines.policies import (
    POLICIES,
    Decision,
    PrecopyStats,
    converge,
    first_of,
    max_downtime,
    max_iterations,
    min_remaining,
    parse_policies,
    xen_default,
)

GO, STOP, ABORT = Decision.CONTINUE_PRECOPY, Decision.STOP_AND_COPY, Decision.ABORT
MB = 1e6


def stats(
    iteration: int = 1, dirty: int = 1000, bandwidth: float | None = None, dirty_rate: float | None = None
) -> PrecopyStats:
    return PrecopyStats(iteration, 0, dirty, bandwidth, dirty_rate)


@pytest.mark.parametrize(
    ("iteration", "dirty", "answer"),
    [
        (0, 50, GO),
        (0, 49, STOP),
        (4, 1 << 28, GO),
        (5, 1 << 28, STOP),
        (4, -1, GO),  # behind a pass the number is not known, which is not "fewer than 50"
        (5, -1, STOP),
        (1, 0, STOP),
    ],
)
def test_the_default_is_xens_five_rounds_or_fewer_than_50_pages(
    iteration: int, dirty: int, answer: Decision
) -> None:
    assert xen_default(stats(iteration, dirty)) is answer


def test_max_iterations_looks_at_nothing_else() -> None:
    assert max_iterations(8)(stats(7, 0)) is GO
    assert max_iterations(8)(stats(8, -1)) is STOP


def test_min_remaining_waits_until_the_number_is_known() -> None:
    policy = min_remaining(200)
    assert [policy(stats(1, dirty)) for dirty in (-1, 200, 199)] == [GO, GO, STOP]


def test_max_downtime_weighs_the_dirty_pages_against_the_measured_bandwidth() -> None:
    policy = max_downtime(0.3)
    assert policy(stats(0, 1000)) is GO  # nothing measured yet
    assert policy(stats(1, -1, 100 * MB)) is GO
    assert policy(stats(1, 7325, 100 * MB)) is GO  # 7325 * 4096 octets take 0.30003 s
    assert policy(stats(1, 7324, 100 * MB)) is STOP  # 0.29999 s


def test_converge_aborts_only_after_three_losing_rounds_in_a_row() -> None:
    losing, winning = stats(1, 99, 50 * MB, 60 * MB), stats(1, 99, 50 * MB, 40 * MB)
    behind_a_pass = stats(1, -1, 50 * MB)
    policy = converge(3)
    asked = [losing, behind_a_pass, losing, winning, losing, behind_a_pass, losing, behind_a_pass, losing]
    assert [policy(s) for s in asked] == [GO] * 8 + [ABORT]


def test_converge_starts_anew_with_every_save() -> None:
    losing = stats(1, 99, 50 * MB, 60 * MB)
    policy = converge(2)
    assert [policy(s) for s in (losing, stats(0, 99), losing, losing)] == [GO, GO, GO, ABORT]


def test_of_several_policies_the_first_that_decides_counts() -> None:
    stop, abort = (lambda _: STOP), (lambda _: ABORT)
    assert first_of(max_iterations(9), stop, abort)(stats()) is STOP
    assert first_of(abort, stop)(stats()) is ABORT
    assert first_of(max_iterations(9), min_remaining(1))(stats()) is GO


def test_a_policy_behind_one_that_decides_still_counts_its_rounds() -> None:
    losing = stats(1, 99, 50 * MB, 60 * MB)
    answers = iter([STOP, GO])
    policy = first_of(lambda _: next(answers), converge(2))
    assert [policy(losing), policy(losing)] == [STOP, ABORT]


@pytest.mark.parametrize(
    ("texts", "asked", "answer"),
    [
        ((), stats(5, 1 << 20), STOP),
        (("xen",), stats(5, 1 << 20), STOP),
        (("max-iterations=8",), stats(7, 0), GO),
        (("max-iterations=8,min-remaining=200",), stats(1, 199), STOP),
        (("max-iterations=8", " min-remaining=200 "), stats(8, 999), STOP),
        (("max-downtime=300ms",), stats(1, 7324, 100 * MB), STOP),
        (("max-downtime=0.3s",), stats(1, 7325, 100 * MB), GO),
        (("max-downtime=1",), stats(1, 24414, 100 * MB), STOP),
        (("converge=1",), stats(1, 999, 50 * MB, 60 * MB), ABORT),
    ],
)
def test_policies_are_named_as_a_user_writes_them(
    texts: tuple[str, ...], asked: PrecopyStats, answer: Decision
) -> None:
    assert parse_policies(texts)(asked) is answer


def test_a_policy_that_only_aborts_gets_xens_default_behind_it() -> None:
    assert parse_policies(["converge"])(stats(5, 1 << 20)) is STOP


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("fastest", "there is no policy 'fastest'; there are xen, max-iterations"),
        ("max-iterations", "policy max-iterations: expected a whole number, found ''"),
        ("max-iterations=-1", "expected a whole number"),
        ("max-iterations=²", "expected a whole number"),
        ("max-downtime=300", None),
        ("max-downtime=3m", "expected a time such as 300ms"),
        ("max-downtime=inf", "expected a time such as 300ms"),
        ("xen=5", "takes no value"),
    ],
)
def test_a_policy_that_is_none_is_refused_with_what_was_expected(text: str, complaint: str | None) -> None:
    if complaint is None:
        parse_policies([text])
    else:
        with pytest.raises(ValueError, match=complaint):
            parse_policies([text])


@given(st.lists(st.sampled_from([STOP, ABORT, GO])), st.integers(0, 9), st.integers(-1, 99))
def test_a_composition_answers_what_one_of_its_parts_answers(
    answers: list[Decision], iteration: int, dirty: int
) -> None:
    composed = first_of(*[lambda _, a=a: a for a in answers])(stats(iteration, dirty))
    assert composed in answers or composed is GO


def test_every_named_policy_explains_itself() -> None:
    assert all(policy.help for policy in POLICIES.values())
