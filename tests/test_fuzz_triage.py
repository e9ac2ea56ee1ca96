"""Which findings are the same, and where migstream and a target disagree."""

from __future__ import annotations

from migstream.fuzzing.target import Execution, Outcome
from migstream.fuzzing.triage import Signature, normalised, signature_of
from migstream.fuzzing.verdicts import JUDGES, Verdict, disagreement, own_failure
from tests import build


def ended(
    outcome: Outcome, output: str = "", *, code: int | None = None, signal: int | None = None
) -> Execution:
    return Execution(outcome, code, signal, output.encode(), 0.1)


def crash(output: str) -> Signature | None:
    return signature_of(ended(Outcome.CRASH, output, code=1), "/dev/shm/x/stream")


PYTHON = """\
read 17 records
Traceback (most recent call last):
  File "/home/a/reader.py", line 130, in <module>
    main()
  File "/home/a/reader.py", line 12, in main
    walk(image)
  File "/home/a/reader.py", line 40, in walk
    table[index] = value
    ~~~~~^^^^^^^
IndexError: list assignment index out of range
"""

ASAN = """\
==4711==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x602000000017 at pc 0x7f bp 0x7ffe sp 0x7f
READ of size 8 at 0x602000000017 thread T0
    #0 0x7f3e in __interceptor_memcpy ../../src/asan_interceptors.cpp:827
    #1 0x4011 in page_data /home/a/reader.c:80
    #2 0x4012 in records /home/a/reader.c:120:5
    #3 0x4013 in main /home/a/reader.c:150

0x602000000017 is located 0 bytes to the right of 7-byte region
allocated by thread T0 here:
    #0 0x7f3f in __interceptor_malloc ../../src/asan_malloc_linux.cpp:145
    #1 0x4014 in other /home/a/reader.c:99
"""


def test_a_traceback_gives_exception_frames_and_statement() -> None:
    assert crash(PYTHON) == Signature(
        "crash",
        "IndexError",
        ("reader.py:walk (table[index] = value)", "reader.py:main", "reader.py:<module>"),
    )


def test_where_a_file_lies_and_how_long_it_is_makes_no_other_finding() -> None:
    moved = PYTHON.replace("/home/a/", "/srv/b/").replace("line 40", "line 44").replace("17", "18")
    assert crash(moved) == crash(PYTHON)
    assert crash(PYTHON.replace("table[index] = value", "other()")) != crash(PYTHON)


def test_the_last_of_several_tracebacks_counts() -> None:
    first = 'Traceback (most recent call last):\n  File "x.py", line 1, in inner\nKeyError: 3\n\n'
    assert crash(first + PYTHON) == crash(PYTHON)


def test_a_recursion_counts_once() -> None:
    deep = '  File "/home/a/reader.py", line 40, in walk\n    table[index] = value\n'
    assert crash(PYTHON.replace(deep, deep * 50)) == crash(PYTHON)


def test_a_sanitizers_report_gives_its_kind_and_the_programs_own_frames() -> None:
    expected = ("reader.c:page_data", "reader.c:records", "reader.c:main")
    assert crash(ASAN) == Signature("crash", "heap-buffer-overflow", expected)
    assert crash(ASAN.replace("0x40", "0x55").replace("4711", "12").replace(":80", ":81")) == crash(ASAN)


def test_undefined_behaviour_is_told_by_file_and_message() -> None:
    found = crash("src/reader.c:80:12: runtime error: left shift of 77 by 33 places\n")
    assert found == Signature("crash", "runtime error", ("reader.c: left shift of # by # places",))


def test_without_frames_the_last_lines_count_without_what_varies() -> None:
    one = signature_of(ended(Outcome.CRASH, "page 3\nbad pfn 0x1f at 0x7ffd12\n", signal=11))
    other = signature_of(ended(Outcome.CRASH, "page 9\nbad pfn 0x20 at 0x7ffd99\n", signal=11))
    assert one == other == Signature("crash", "SIGSEGV", ("bad pfn # at #", "page #"))
    assert signature_of(ended(Outcome.CRASH, "page 9\nbad pfn 0x20 at 0x7ffd99\n", signal=6)) != one


def test_lines_lose_addresses_numbers_octets_and_directories() -> None:
    assert normalised("/dev/shm/x/stream: 12 of 0xAB, b'\\x00' in /usr/lib/libx.so", "/dev/shm/x/stream") == (
        "{}: # of #, b'#' in libx.so"
    )
    assert normalised("vcpu64 at deadbeef12") == "vcpu64 at deadbeef12"
    assert normalised("\x1b[31mred") == "\\x1b[#mred"


def test_accept_and_refuse_are_no_findings_and_hangs_are_told_by_what_they_do() -> None:
    assert signature_of(ended(Outcome.ACCEPT, code=0)) is None
    assert signature_of(ended(Outcome.REFUSE, code=1)) is None
    assert signature_of(ended(Outcome.HANG, "1 of 2")) == signature_of(ended(Outcome.HANG, "2 of 2"))


def test_the_name_of_a_finding_is_a_safe_file_name() -> None:
    name = Signature("crash", "struct.error ../../x\n", ("a",)).name
    assert name.startswith("crash-struct-error-x-")
    assert name.replace("-", "").isalnum()


def test_a_signature_survives_json() -> None:
    found = crash(ASAN)
    assert found is not None
    assert Signature.from_json(found.to_json()) == found


SOUND, CUT = build.image(), build.image(end=False)


def test_verify_judges_by_errors_and_names_its_rules() -> None:
    sound, cut = JUDGES["verify"](SOUND), JUDGES["verify"](CUT)
    assert sound is not None
    assert cut is not None
    assert sound.accepts
    assert (cut.accepts, cut.rules) == (False, ("stream-truncated",))
    padded = JUDGES["verify"](SOUND + b"more")
    assert padded is not None
    assert (padded.accepts, "after-end" in padded.rules) == (True, True)


def test_restore_judges_by_the_engine() -> None:
    taken, cut = JUDGES["restore"](SOUND), JUDGES["restore"](CUT)
    assert taken is not None
    assert cut is not None
    assert (taken.accepts, cut.accepts, cut.rules) == (True, False, ("stream-truncated",))
    assert JUDGES["restore"](build.remus_stream()) is not None


def test_restore_has_no_verdict_on_a_guest_that_is_too_large() -> None:
    high = build.header() + build.record(build.STATIC_DATA_END) + build.page_data([1 << 40], build.page(1))
    assert JUDGES["restore"](high + build.record(build.END)) is None


def test_a_target_that_accepts_what_migstream_refuses_is_told_by_the_rule() -> None:
    verdict = Verdict(False, ("page-type", "layout-missing"), "...")
    found = disagreement(ended(Outcome.ACCEPT, code=0), verdict)
    assert found == Signature("disagreement", "target accepts", ("page-type",))
    assert disagreement(ended(Outcome.REFUSE, code=1), verdict) is None


def test_a_target_that_refuses_what_migstream_accepts_is_told_by_what_it_says() -> None:
    verdict = Verdict(True, (), "sound")
    found = disagreement(ended(Outcome.REFUSE, "reading\nversion 3 is new\n", code=2), verdict)
    assert found == Signature("disagreement", "target refuses", ("exit code 2", "version # is new"))
    assert disagreement(ended(Outcome.ACCEPT, code=0), verdict) is None


def test_a_crash_is_no_verdict_and_no_verdict_is_no_disagreement() -> None:
    assert disagreement(ended(Outcome.CRASH, signal=11), Verdict(True, (), "sound")) is None
    assert disagreement(ended(Outcome.ACCEPT, code=0), None) is None


def test_an_exception_of_migstream_itself_is_a_finding() -> None:
    found = own_failure(PYTHON)
    assert (found.kind, found.title) == ("disagreement", "migstream fails with IndexError")
