"""``migstream conformance``: another reader is run on the vectors and scored."""

from __future__ import annotations

import fcntl
import json
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from migstream.cli.group import group
from migstream.conformance import (
    ExternalReader,
    Kind,
    Level,
    ReaderError,
    Vector,
    load_vectors,
    own,
    run_own,
    score,
)

FEW = ("sound/hvm-image", "hvm/bad-id", "layout/v2-pv")  # sound, unsound, sound
ONLY = [word for name in FEW for word in ("--only", name)]
VECTORS = {f"{vector.group}/{vector.name}": vector for vector in load_vectors()}


def conformance(*args: str) -> Result:
    return CliRunner().invoke(group, ["conformance", *args])


def reader(code: str, *args: str) -> str:
    """Return the command line of a reader in Python; ``path`` is the stream's, ``octets`` what is there."""
    start = "import os, sys, time, signal; path = sys.argv[1]; octets = open(path, 'rb').read(); "
    return shlex.join([sys.executable, "-c", start + code, *(args or ("{}",))])


MARKED = reader("sys.exit(not octets.startswith(b'\\xff' * 8 + b'XENF'))")


def kinds(command: str, *names: str, level: Level = Level.VERIFY, timeout_s: float = 30) -> list[Kind]:
    outside = ExternalReader(command, level, timeout_s)
    return [outcome.kind for outcome in outside.run(VECTORS[name] for name in names or FEW)]


def test_migstream_itself_agrees_on_a_group() -> None:
    told = conformance("--only", "sound/*")
    assert told.exit_code == 0
    assert told.output.splitlines()[-1].split() == ["all", "11", "11", "0", "0", "0"]


def test_a_reader_that_agrees_gets_0_and_a_table_by_group() -> None:
    told = conformance("--reader", MARKED, *ONLY)
    assert told.exit_code == 0
    assert [line.split() for line in told.output.splitlines()] == [
        ["group", "vectors", "agrees", "differs", "crashed", "timed", "out"],
        ["sound", "1", "1", "0", "0", "0"],
        ["layout", "1", "1", "0", "0", "0"],
        ["hvm", "1", "1", "0", "0", "0"],
        ["all", "3", "3", "0", "0", "0"],
    ]


def test_what_differs_is_listed_with_its_description_and_what_was_expected() -> None:
    told = conformance("--reader", "true", *ONLY)
    assert told.exit_code == 1
    assert told.output.splitlines()[:2] == [
        "differs: hvm/bad-id: an image whose id is not XENF",
        "    expected refuse, found accept",
    ]


def test_json_has_counts_by_group_and_the_disagreements() -> None:
    told = conformance("--reader", "false", *ONLY, "--json")
    shown = json.loads(told.output)
    assert told.exit_code == 1
    assert (shown["schema"], shown["agrees"], shown["not_asked"]) == ("migstream-conformance-1", False, 0)
    assert shown["groups"]["hvm"] == {"vectors": 1, "agrees": 1, "differs": 0, "crashed": 0, "timed out": 0}
    assert shown["disagreements"][0] == {
        "name": "hvm-image",
        "group": "sound",
        "description": "an HVM image",
        "outcome": "differs",
        "differences": ["expected accept, found refuse"],
    }


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("sys.exit(3)", "expected accept, found exit code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "expected accept, found signal SIGSEGV"),
        ("raise ValueError('oh')", None),  # Python's 1: a refusal
        ("sys.stderr.write('first\\nassertion failed\\n'); os.abort()", "signal SIGABRT: assertion failed"),
    ],
)
def test_any_other_exit_is_a_crash_told_by_code_or_signal_and_its_last_words(
    code: str, said: str | None
) -> None:
    (outcome,) = ExternalReader(reader(code)).run([VECTORS["sound/hvm-image"]])
    assert outcome.kind is (Kind.DIFFERS if said is None else Kind.CRASHED)
    assert (said or "found refuse") in outcome.differences[0]


def test_a_reader_that_gives_no_answer_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    held = tmp_path / "held"
    lock = f"import fcntl; fcntl.flock(os.open({str(held)!r}, os.O_CREAT), fcntl.LOCK_EX); "
    code = lock + "os.fork(); time.sleep(60)"
    (outcome,) = ExternalReader(reader(code), timeout_s=3).run([VECTORS["sound/hvm-image"]])
    assert (outcome.kind, outcome.differences) == (Kind.TIMED_OUT, ("expected accept, no answer in 3 s",))
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # which both held, and nobody does any more


def test_without_a_place_for_the_path_the_stream_comes_on_standard_input() -> None:
    code = "import sys; sys.exit(not sys.stdin.buffer.read().startswith(b'\\xff' * 8 + b'XENF'))"
    assert kinds(shlex.join([sys.executable, "-c", code])) == [Kind.AGREES] * 3


def test_a_restore_is_told_type_and_guest_and_asked_for_images_only() -> None:
    names = ("sound/hvm-image", "sound/remus-image", "hvm/hvm-into-pv", "sound/xl-file")
    told = "sys.exit(not (sys.argv[2:] in (['remus', 'hvm'], ['plain', 'hvm'])))"
    full = reader(told, "{}", "{type}", "{guest}")
    assert kinds(full, *names, level=Level.RESTORE) == [Kind.AGREES] * 3
    assert kinds("true {}", *names, level=Level.RESTORE) == [Kind.AGREES]
    shown = conformance(
        "--reader", "true {}", "--level", "restore", *[w for n in names for w in ("--only", n)]
    )
    assert shown.output.splitlines()[-1].startswith("3 vectors not asked")


def test_patterns_choose_vectors_and_the_last_that_matches_counts() -> None:
    shown = conformance("--only", "sound/*", "--only", "!*-in-libxl", "--only", "colo-*", "--json")
    assert json.loads(shown.output)["groups"]["sound"]["vectors"] == 10
    shown = conformance("--only", "!sound/*", "--only", "!*", "--only", "origin/*", "--json")
    assert list(json.loads(shown.output)["groups"]) == ["origin"]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--only", "nothing"], 2, "no vector is left to ask about"),
        (["--level", "restore"], 2, "--level says what a --reader is asked"),
        (["--reader", "/nowhere/reader {}"], 1, "cannot be run: No such file or directory"),
        (["--reader", "a 'b"], 1, "cannot be run: No closing quotation"),
        (["--reader", ""], 1, "cannot be run: it is empty"),
        (["--vectors", "."], 1, "index.json: No such file or directory"),
    ],
)
def test_what_cannot_be_asked_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = conformance(*args)
    assert shown.exit_code == code
    assert said in shown.output


def test_a_reader_that_cannot_be_run_is_no_crash_of_it() -> None:
    with pytest.raises(ReaderError):
        kinds("/nowhere/reader {}")


def test_an_exception_of_our_own_reader_is_scored_as_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(stream: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(own, "verify", verify)
    vector: Vector = VECTORS["sound/hvm-image"]
    outcomes = list(run_own([vector]))
    assert outcomes[0].differences == ("ZeroDivisionError: oh",)
    assert score(outcomes) == {"sound": {Kind.CRASHED: 1}}
