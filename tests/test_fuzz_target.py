"""Running the program that is fuzzed: what each ending is classed as, and what it cannot do to us."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from migstream.fuzzing.target import KEPT_OUTPUT, Command, Execution, Outcome, Target, TargetError

PYTHON = (sys.executable, "-I", "-S", "-c")


def run(*argv: str, octets: bytes = b"octets", **options: Any) -> Execution:
    with Target(Command(argv, **{"timeout_s": 20.0, **options})) as target:
        return target.run(octets)


def sh(script: str, **options: Any) -> Execution:
    return run("sh", "-c", script, "sh", "{}", **options)


def wait_for_end(pid: int) -> None:
    """Wait until a process that was killed is gone, or a zombie; the test hangs where it was not."""
    state = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while state.read_text().split()[2] != "Z":
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("script", "outcome", "ending"),
    [
        ("exit 0", Outcome.ACCEPT, "exit code 0"),
        ("exit 3", Outcome.REFUSE, "exit code 3"),
        ("kill -SEGV $$", Outcome.CRASH, "SIGSEGV"),
        ("kill -ABRT $$", Outcome.CRASH, "SIGABRT"),
        ("kill -TERM $$", Outcome.CRASH, "SIGTERM"),
        ("exit 139", Outcome.CRASH, "exit code 139"),  # as a shell passes SIGSEGV on
        ("kill -KILL $$", Outcome.MEMORY, "SIGKILL"),  # as the kernel does where memory is short
        ("echo '==7==ERROR: AddressSanitizer: SEGV on x'; exit 1", Outcome.CRASH, "exit code 1"),
        ("echo 'reader.c:3:4: runtime error: overflow'", Outcome.CRASH, "exit code 0"),
        ("echo 'Traceback (most recent call last):' >&2; exit 1", Outcome.CRASH, "exit code 1"),
        ("echo 'Traceback (most recent call last):' >&2", Outcome.ACCEPT, "exit code 0"),
        ("echo 'MemoryError' >&2; exit 1", Outcome.MEMORY, "exit code 1"),
        ("echo \"thread 'main' panicked at src/x.rs:1:2:\" >&2; exit 101", Outcome.CRASH, "exit code 101"),
    ],
)
def test_each_ending_has_its_class(script: str, outcome: Outcome, ending: str) -> None:
    found = sh(script)
    assert (found.outcome, found.ending) == (outcome, ending)


def test_an_exit_code_may_be_named_a_crash_and_the_output_be_left_alone() -> None:
    assert sh("exit 77", crash_codes=frozenset({77})).outcome is Outcome.CRASH
    traceback = "echo 'Traceback (most recent call last):'; exit 1"
    assert sh(traceback, look_at_output=False).outcome is Outcome.REFUSE


def test_the_stream_is_in_the_file_that_stands_for_the_braces() -> None:
    assert sh('cat "$1"', octets=b"\0\xff stream").output == b"\0\xff stream"
    found = run("sh", "-c", 'echo "$1"', "sh", "--file={}")
    assert found.output.startswith(b"--file=/")
    assert found.output.endswith(b"/stream\n")


def test_the_stream_may_come_on_standard_input_which_need_not_be_read() -> None:
    large = os.urandom(1 << 20)
    digest = run("cksum", octets=large, stdin=True)
    assert digest.output.split()[1] == b"1048576"
    for script in ("exit 0", "exec <&-; exit 0", "head -c 1 >/dev/null"):
        assert run("sh", "-c", script, octets=large, stdin=True).outcome is Outcome.ACCEPT


def test_a_program_that_does_not_end_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    found = sh(f"sleep 1000 & echo $! >{note}; wait", timeout_s=0.5)
    assert (found.outcome, found.ending, found.busy) == (Outcome.HANG, "no end", False)
    wait_for_end(int(note.read_text()))


def test_a_program_that_computes_without_end_is_told_from_one_that_waits() -> None:
    assert sh("while :; do :; done", timeout_s=0.5).busy


def test_what_a_program_leaves_behind_is_killed_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    assert sh(f"sleep 1000 & echo $! >{note}; exit 3").outcome is Outcome.REFUSE
    wait_for_end(int(note.read_text()))


def test_address_space_is_limited() -> None:
    greedy = "import sys; b'x' * (1 << 30)"
    assert run(*PYTHON, greedy, "{}", memory=256 << 20).outcome is Outcome.MEMORY
    assert run(*PYTHON, greedy.replace("30", "20"), "{}", memory=256 << 20).outcome is Outcome.ACCEPT


def test_a_target_is_never_without_its_limit_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*args: object) -> None:  # on a busy machine it is a program's end before the parent goes on
        os.waitid(os.P_PID, int(str(args[0])), os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(resource, "prlimit", late)
    assert run(*PYTHON, "b'x' * (1 << 30)", "{}", memory=256 << 20).outcome is Outcome.MEMORY
    for _ in range(10):
        assert sh("ulimit -v", memory=100 << 20).output == b"102400\n"
    assert sh("ulimit -v", memory=None).output == b"unlimited\n"


def test_a_program_that_finds_no_room_to_be_loaded_wants_memory() -> None:
    assert run(*PYTHON, "pass", "{}", memory=3 << 20).outcome is Outcome.MEMORY


def test_output_without_end_is_cut_and_counts_as_want_of_room() -> None:
    found = sh("yes line")
    assert found.outcome is Outcome.MEMORY
    assert found.ending == "SIGXFSZ"
    assert len(found.output) < KEPT_OUTPUT + 100
    assert b"octets left out" in found.output


def test_what_a_program_starts_at_once_has_its_limit_on_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "prlimit", lambda *_: None)  # as if it came too late
    for memory in (1 << 30, None):
        assert sh("ulimit -f; true", memory=memory).output == b"131072\n"  # 64 MiB in blocks of 512 octets


def test_a_limit_of_the_programs_own_is_not_refused() -> None:
    raises = "import resource as r; r.setrlimit(r.RLIMIT_CORE, (0, r.getrlimit(r.RLIMIT_CORE)[1]))"
    assert run(*PYTHON, raises, "{}").outcome is Outcome.ACCEPT


def test_a_program_may_do_what_it_likes_to_its_input() -> None:
    scripts = ('rm "$1"', 'rm "$1"; mkdir "$1"; touch "$1/x"', 'chmod 0 "$1"', 'echo x >>"$1"')
    for script in scripts:
        with Target(Command(("sh", "-c", script, "sh", "{}"))) as target:
            assert target.run(b"first").outcome is Outcome.ACCEPT
            target.run(b"second")
            target._write(b"third")
            assert target.stream_path.read_bytes() == b"third"


def test_signals_are_as_a_shell_leaves_them() -> None:
    ignored = int(sh("grep SigIgn /proc/self/status").output.split()[1], 16)
    assert not any(ignored >> number - 1 & 1 for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "the target is empty"),
        (("sh", "-c", "exit"), "write {} for its file, or give --stdin"),
        (("no-such-program-here", "{}"), "not found in PATH"),
        (("./no/such/program", "{}"), "no such file"),
        (("/", "{}"), "is a directory"),
    ],
)
def test_a_target_that_cannot_be_run_is_told_before(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        Command(argv).check()


def test_a_file_that_is_not_executable_is_told(tmp_path: Path) -> None:
    script = tmp_path / "reader"
    script.write_text("echo hello\n")
    with pytest.raises(TargetError, match="is not executable; chmod"):
        Command((str(script), "{}")).check()


@pytest.mark.parametrize("memory", [None, 1 << 30])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo hello\n", "does its first line name its interpreter"),
        ("#!/no/such/shell\n", "cannot be run: No such file or directory"),
    ],
)
def test_a_script_without_an_interpreter_is_told(
    text: str, message: str, memory: int | None, tmp_path: Path
) -> None:
    script = tmp_path / "reader"
    script.write_text(text)
    script.chmod(0o755)
    with pytest.raises(TargetError, match=message):
        run(str(script), "{}", memory=memory)


def test_a_targets_own_exit_codes_126_and_127_are_no_failure_to_run_it() -> None:
    for code in (126, 127):
        assert sh(f"echo sh: not found; exit {code}").ending == f"exit code {code}"


def test_nothing_stays_in_the_scratch_directory() -> None:
    with Target(Command(("true", "{}"))) as target:
        target.run(b"x")
        assert target.directory.is_dir()
    assert not target.directory.exists()


def test_a_command_survives_json() -> None:
    command = Command(("a", "{}"), stdin=False, memory=None, crash_codes=frozenset({7}))
    assert Command.from_json(command.to_json()) == command
