"""``migstream fuzz`` as a user meets it: campaigns, findings, going on, and what goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from click.testing import CliRunner, Result

from migstream.cli.group import group
from migstream.fuzzing import findings
from migstream.fuzzing.corpus import load_corpus
from migstream.fuzzing.findings import Finding, load_finding
from migstream.fuzzing.state import STATE_FILE, load_state
from migstream.fuzzing.target import Command
from migstream.fuzzing.worker import Plan, stream_of
from tests import build


def fuzz(*args: object) -> Result:
    if ("--target" in args or "--resume" in args) and "--jobs" not in args:
        args = (*args, "--jobs", 1)  # each worker takes its time to start
    return CliRunner().invoke(group, ["fuzz", *map(str, args)])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    directory = tmp_path / "corpus"
    directory.mkdir()
    (directory / "hvm.zst").write_bytes(zstandard.compress(build.image()))
    (directory / "whole.xl").write_bytes(build.xl(build.libxl_stream()))
    return directory


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """A reader that crashes on a stream without the first two pages' content, and notes each run."""
    script = tmp_path / "reader"
    script.write_text(
        "#!/bin/sh\n"
        f'cksum <"$1" >>{shlex.quote(str(tmp_path / "runs"))}\n'
        'grep -q "\\"\\"\\"\\"" "$1" || kill -SEGV $$\n'
    )
    script.chmod(0o755)
    return script


def campaign(reader: Path, corpus: Path, out: Path, *more: object) -> Result:
    return fuzz("--target", f"{shlex.quote(str(reader))} {{}}", "--corpus", corpus, "--out", out, *more)


def runs(reader: Path) -> list[str]:
    return (reader.parent / "runs").read_text().splitlines()


def test_a_finding_is_a_folder_with_all_that_is_needed(reader: Path, corpus: Path, tmp_path: Path) -> None:
    result = campaign(reader, corpus, tmp_path / "out", "--executions", 100)
    assert result.exit_code == 1, result.output
    assert "crash SIGSEGV" in result.output
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert {path.name for path in folder.iterdir()} == {
        "stream",
        "original",
        "finding.json",
        "finding.txt",
        "replay.sh",
    }
    assert (folder / "stream").read_bytes() == b""  # which has no such page either
    finding = load_finding(folder)
    assert finding.minimised_by is not None
    plan = Plan(finding.command, finding.seed)
    streams = load_corpus(corpus).streams
    assert stream_of(plan, streams, finding.number).octets == finding.original
    text = (folder / "finding.txt").read_text()
    assert text.startswith("crash: SIGSEGV\n")
    assert all(step in text for step in finding.steps)

    again = fuzz("--replay", folder)
    assert (again.exit_code, "it came again" in again.output) == (1, True)
    replayed = subprocess.run(["sh", folder / "replay.sh"], check=False)
    assert replayed.returncode in (-signal.SIGSEGV, 128 + signal.SIGSEGV)
    reader.write_text("#!/bin/sh\n")
    gone = fuzz("--replay", folder)
    assert (gone.exit_code, "did not come again" in gone.output) == (0, True)


def test_nothing_found_is_exit_code_0(corpus: Path, tmp_path: Path) -> None:
    result = fuzz("--target", "true {}", "--corpus", corpus, "--out", tmp_path / "out", "--executions", 30)
    assert result.exit_code == 0, result.output
    assert "30 executions" in result.output
    assert "; 0 findings" in result.output


def test_the_streams_that_come_along_are_the_corpus_where_none_is_given(tmp_path: Path) -> None:
    result = fuzz("--target", "true {}", "--out", tmp_path / "out", "--executions", 5)
    assert result.exit_code == 0, result.output
    assert len(load_corpus(None).streams) > 80


def test_the_same_seed_finds_the_same_whatever_the_number_of_jobs(
    reader: Path, corpus: Path, tmp_path: Path
) -> None:
    states = []
    for jobs in (1, 3):
        out = tmp_path / f"out{jobs}"
        assert campaign(reader, corpus, out, "--executions", 60, "--jobs", jobs).exit_code == 1
        state = load_state(out)
        states.append(
            (state.outcomes, [(known.signature, known.number) for known in state.findings.values()])
        )
    assert states[0] == states[1]
    out = tmp_path / "other"
    campaign(reader, corpus, out, "--executions", 60, "--seed", "another")
    assert load_state(out).outcomes != states[0][0]


def test_a_campaign_goes_on_where_it_ended_and_repeats_nothing(
    reader: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    reader.write_text(reader.read_text().replace("kill -SEGV $$", "exit 3"))  # nothing to minimise
    assert campaign(reader, corpus, out, "--executions", 25).exit_code == 0
    assert fuzz("--resume", "--out", out, "--executions", 50, "--jobs", 2).exit_code == 0
    in_two, state = runs(reader), load_state(out)
    (reader.parent / "runs").unlink()
    assert campaign(reader, corpus, tmp_path / "whole", "--executions", 50).exit_code == 0
    assert sorted(in_two) == sorted(runs(reader))
    assert state.outcomes == load_state(tmp_path / "whole").outcomes
    assert state.next == 50


def process(*args: object) -> subprocess.Popen[str]:
    code = "from migstream.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "fuzz", *map(str, args)], stdout=subprocess.PIPE, text=True
    )


def wait_for(condition: Iterator[bool]) -> None:
    while not next(condition):
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_campaign_can_go_on(how: int, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = process("--target", "true {}", "--corpus", corpus, "--out", out, "--time", 600, "--jobs", 2)
    children: list[int] = []

    def under_way() -> Iterator[bool]:
        while True:
            assert running.poll() is None
            yield (out / STATE_FILE).exists() and load_state(out).next > 5

    wait_for(under_way())
    listed = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text()
    children += map(int, listed.split())
    running.send_signal(how)
    said, _ = running.communicate(timeout=60)
    if how != signal.SIGKILL:
        assert running.returncode == 130
        assert f"--resume --out {out}" in said
    for child in children:  # the workers go too, even from one that was killed
        wait_for(iter(lambda child=child: not Path(f"/proc/{child}/cmdline").exists(), None))  # type: ignore[misc]  # mypy takes the default for an argument
    done = load_state(out).next
    resumed = fuzz("--resume", "--out", out, "--executions", done + 20)
    assert resumed.exit_code == 0, resumed.output
    assert load_state(out).next == done + 20


def test_what_was_not_minimised_when_it_ended_is_minimised_when_it_goes_on(
    reader: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    campaign(reader, corpus, out, "--executions", 60)
    state = load_state(out)
    (known,) = state.findings.values()
    folder = out / known.signature.name
    (folder / "stream").write_bytes((folder / "original").read_bytes())
    known.minimised = False
    state.save(out)
    assert fuzz("--resume", "--out", out, "--executions", 60).exit_code == 1
    assert load_state(out).findings[known.signature.key].minimised
    assert (folder / "stream").read_bytes() == b""


def test_a_changed_corpus_is_no_campaign_to_go_on_with(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fuzz("--target", "true {}", "--corpus", corpus, "--out", out, "--executions", 3)
    (corpus / "new").write_bytes(build.libxl_stream())
    result = fuzz("--resume", "--out", out, "--executions", 6)
    assert (result.exit_code, "the corpus is not the one" in result.output) == (2, True)


def test_differential_keeps_disagreements_by_the_rule_that_is_overlooked(
    corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = ("--target", "true {}", "--corpus", corpus, "--out", out, "--executions", 80, "--differential")
    result = fuzz(*args)
    assert result.exit_code == 1, result.output
    overlooked = {known.signature.where for known in load_state(out).findings.values()}
    assert ("stream-truncated",) in overlooked or ("stream-damaged",) in overlooked
    assert len(overlooked) > 3
    one = next(path for path in out.iterdir() if path.is_dir())
    assert "migstream refuses (" in (one / "finding.txt").read_text()
    assert fuzz("--replay", one).exit_code == 1


def test_differential_tells_what_a_target_refuses_wrongly(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    target = "sh -c 'echo no; exit 4' sh {}"
    result = fuzz(
        "--target", target, "--corpus", corpus, "--out", out, "--executions", 2, "--differential", "restore"
    )
    assert result.exit_code == 1, result.output
    (known,) = load_state(out).findings.values()
    assert (known.signature.title, known.signature.where) == ("target refuses", ("exit code 4", "no"))
    assert "accepts none of the 2 streams" in result.output


def test_json_has_a_line_for_each_finding_and_the_result(reader: Path, corpus: Path, tmp_path: Path) -> None:
    result = campaign(reader, corpus, tmp_path / "out", "--executions", 60, "--json")
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert [line["event"] for line in lines if line["event"] != "status"] == [
        "finding",
        "minimised",
        "result",
    ]
    assert lines[-1]["executions"] == 60
    assert lines[-1]["outcomes"].keys() >= {"accept", "crash"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Missing option '--target'"),
        (("--target", "no-such-program-here {}"), "not found in PATH"),
        (("--target", "true"), "write {} for its file, or give --stdin"),
        (("--target", "true '{}"), "No closing quotation"),
        (("--target", "true {}", "--corpus", "/no/such/directory"), "is no directory"),
        (("--target", "true {}", "--memory", "lots"), "is no size"),
        (("--resume",), "holds no campaign to go on with"),
        (("--replay", "/no/such/finding"), "is no finding"),
    ],
)
def test_usage_errors_say_what_to_do(args: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = fuzz(*args, "--out", tmp_path / "out")
    assert result.exit_code == (1 if "--replay" in args else 2)
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_a_campaign_is_not_begun_over_another_and_takes_no_other_target(corpus: Path, tmp_path: Path) -> None:
    args = ("--target", "true {}", "--corpus", corpus, "--out", tmp_path / "out", "--executions", 2)
    assert fuzz(*args).exit_code == 0
    second = fuzz(*args)
    assert (second.exit_code, "go on with it by --resume" in second.output) == (2, True)
    other = fuzz("--resume", "--target", "false {}", "--out", tmp_path / "out")
    assert (other.exit_code, "--resume takes --target from the campaign" in other.output) == (2, True)


def test_garbage_in_the_corpus_is_left_out_and_a_corpus_of_garbage_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "corpus"
    (directory / "deep").mkdir(parents=True)
    (directory / "text").write_text("hello")
    (directory / "empty").touch()
    (directory / "large").write_bytes(build.header() + bytes(1 << 20))
    (directory / "bad.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    (directory / "dangling").symlink_to("nowhere")
    os.mkfifo(directory / "pipe")
    refused = fuzz("--target", "true {}", "--corpus", directory, "--out", tmp_path / "out")
    assert (refused.exit_code, "holds no stream to begin with" in refused.output) == (2, True)
    (directory / "deep" / "stream").write_bytes(build.image())
    (directory / "again").write_bytes(build.image())
    loaded = load_corpus(directory)
    assert loaded.streams == (build.image(),)
    assert {name for name, _ in loaded.left_out} == {"text", "empty", "large", "bad.zst"}


def test_a_target_that_fails_on_everything_alike_is_told_and_leaves_no_campaign(
    corpus: Path, tmp_path: Path
) -> None:
    args = ("--target", "sh -c 'kill -ABRT $$' sh {}", "--corpus", corpus, "--out", tmp_path / "out")
    for _ in range(2):
        result = fuzz(*args, "--executions", 20)
        assert result.exit_code == 2, result.output
        assert "every stream of the corpus ends in the same crash SIGABRT" in result.output


def test_a_target_that_disappears_ends_the_campaign(reader: Path, corpus: Path, tmp_path: Path) -> None:
    reader.write_text('#!/bin/sh\n[ -f "$0.second" ] && rm "$0"; touch "$0.second"\n')
    result = campaign(reader, corpus, tmp_path / "out", "--executions", 50)
    assert (result.exit_code, "cannot be run: No such file" in result.output) == (2, True)
    assert load_state(tmp_path / "out").next <= 50


def test_a_disk_full_of_findings_ends_the_campaign_without_half_a_finding(
    reader: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(finding: Finding) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "finding.txt")

    out = tmp_path / "out"
    monkeypatch.setattr(findings, "describe", no_room)
    result = campaign(reader, corpus, out, "--executions", 60)
    assert (result.exit_code, "No space left on device" in result.output) == (1, True)
    assert [path.name for path in out.iterdir()] == [STATE_FILE]
    monkeypatch.undo()
    result = fuzz("--resume", "--out", out, "--executions", 60)
    assert (result.exit_code, len(load_state(out).findings)) == (1, 1)


def test_text_from_target_and_stream_cannot_drive_the_terminal(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = "sh -c 'printf \"\\033[31mred\\n\"; kill -SEGV $$' sh {}"
    (corpus / "hvm.zst").unlink()
    result = fuzz("--target", script, "--corpus", corpus, "--out", out, "--executions", 1)
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    assert all("\x1b" not in path.read_text() for path in out.glob("*/finding.txt"))


def test_a_damaged_state_or_finding_is_told(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text('{"schema": "migstream-fuzz-1"}')
    result = fuzz("--resume", "--out", tmp_path)
    assert (result.exit_code, "is damaged" in result.output) == (2, True)
    (tmp_path / "finding.json").write_text("{}")
    result = fuzz("--replay", tmp_path)
    assert (result.exit_code, "is damaged" in result.output) == (1, True)


def test_a_plan_survives_json() -> None:
    plan = Plan(Command(("a", "{}")), "7", "restore", 1000)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
