"""The targets: what they raise for, that they replay, and that short runs of each find nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import pytest

from fuzz import corpus, runner
from fuzz.targets import TARGETS, Target
from migstream.errors import StreamError
from migstream.fuzzing.tree import Tree

ROOT = Path(__file__).parents[1]
EXECUTIONS = 150

each_target = pytest.mark.parametrize("name", TARGETS)


@each_target
def test_a_short_run_finds_nothing_and_comes_to_more_than_one_answer(name: str) -> None:
    target = TARGETS[name]
    answers = Counter(
        target.execute(runner.mutation(name, "test", number).octets) for number in range(EXECUTIONS)
    )
    assert len(answers) > 1, answers


@each_target
def test_no_target_minds_an_empty_input_or_nonsense(name: str) -> None:
    for octets in (b"", b"\xff", b"nonsense" * 40, bytes(5000)):
        assert TARGETS[name].execute(octets)


def test_the_corpus_has_every_layer_both_guests_and_legacy_streams() -> None:
    labels = {label for octets in corpus.streams() for label in Tree.parse(octets).labels()}
    for wanted in ("xl SaveFileHeader", "libvirt LibvirtHeader", "xapi XapiHeader", "libxl CHECKPOINT_END"):
        assert wanted in labels
    assert {"libxc X86_PV_INFO", "libxc HVM_PARAMS"} <= labels
    assert corpus.legacy()
    assert corpus.packed()
    assert len(corpus.contexts()) == 2


def test_an_execution_follows_from_target_seed_and_number() -> None:
    assert runner.mutation("reader", "1", 14) == runner.mutation("reader", "1", 14)
    assert runner.mutation("reader", "1", 14) != runner.mutation("reader", "1", 15)


def test_an_execution_that_does_not_end_is_a_finding_and_one_that_waits_its_turn_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "HANG_S", 0.2)
    was = signal.signal(signal.SIGPROF, runner._hang)
    try:
        with pytest.raises(runner.Hang, match=r"no end after 0\.2 s of CPU time"), runner._watched():
            sum(number for number in count())
        with runner._watched():
            time.sleep(0.4)
    finally:
        signal.signal(signal.SIGPROF, was)


def bad_target(octets: bytes) -> str:
    if len(octets) % 7 == 0:
        raise KeyError("planted")
    if len(octets) % 5 == 0:
        raise AssertionError("planted disagreement")
    return "fine"


def test_findings_are_told_once_each_written_down_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TARGETS, "bad", Target("bad", bad_target, corpus.contexts))
    plan = runner.Plan(("bad",), "1", seconds=0.2, workers=2, findings=tmp_path)
    assert runner.run(plan) == 1
    told = capfd.readouterr()
    assert "2 findings" in told.out
    assert told.err.count("finding: python -m fuzz --target bad --seed 1 --only ") == 2
    texts = sorted(tmp_path.glob("bad-*.txt"))
    assert len(texts) == 2
    number = int(texts[0].stem.split("-")[1])
    octets = texts[0].with_suffix(".stream").read_bytes()
    assert octets == runner.mutation("bad", "1", number).octets
    assert runner.replay("bad", "1", number) == 1
    assert "planted" in capfd.readouterr().err


def test_an_error_of_the_package_is_no_finding_and_any_other_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise StreamError("planted")

    def break_down(*_: object, **__: object) -> None:
        raise IndexError("planted")

    octets = corpus.streams()[0]
    monkeypatch.setattr("fuzz.targets.restore", refuse)
    assert TARGETS["restore"].execute(octets) == "refused"
    monkeypatch.setattr("fuzz.targets.restore", break_down)
    with pytest.raises(IndexError):
        TARGETS["restore"].execute(octets)


def test_the_command_runs_and_replays() -> None:
    command = [sys.executable, "-m", "fuzz", "--target", "tree"]
    ran = subprocess.run(
        [*command, "--seconds", "0.5", "--workers", "1"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ", 0 findings" in ran.stdout.splitlines()[-1].replace("executions, ", ", ", 1)
    replayed = subprocess.run([*command, "--only", "3"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert replayed.stdout.startswith("corpus stream ")
    alone = [sys.executable, "-m", "fuzz", "--only", "3"]
    refused = subprocess.run(alone, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--only needs one --target" in refused.stderr


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: pip install '.[fuzz]'")
def test_atheris_runs_every_target(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fuzz.atheris_targets", "all", "-runs=60", "-seed=1"]
    done = subprocess.run(
        [*command, f"-artifact_prefix={tmp_path}/", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("Done 60 runs") == len(TARGETS)


def test_nightly_refuses_hours_that_are_none() -> None:
    done = subprocess.run([ROOT / "fuzz" / "nightly", "soon"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: fuzz/nightly" in done.stderr
