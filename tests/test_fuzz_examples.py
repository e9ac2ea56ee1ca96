"""The readers in ``fuzz/examples``: each of their five planted bugs is found, and minimised."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from migstream.cli.group import group
from migstream.fuzzing.state import Known, load_state

EXAMPLES = Path(__file__).parents[1] / "fuzz" / "examples"
SEED = 12  # a lucky one: others take several hundred executions
AT_ONCE, AT_MOST = 90, 3000  # executions: many times what it takes

#: Bug -> what its signature says: kind, title, and a function among its frames.
PYTHON_BUGS = {
    "py-1": ("crash", "IndexError", "place"),
    "py-2": ("hang", "busy", ""),
    "py-3": ("crash", "KeyError", "type_name"),
    "py-4": ("crash", "struct.error", "page_data"),
    "py-5": ("memory", "MemoryError", "hvm_params"),
}
C_BUGS = {
    "c-1": ("crash", "SEGV|heap-buffer-overflow", "place"),
    "c-2": ("crash", "SEGV|heap-buffer-overflow", "u32"),
    "c-3": ("crash", "heap-buffer-overflow", "hvm_context"),
    "c-4": ("crash", "SEGV|global-buffer-overflow", "hvm_params"),
    "c-5": ("hang", "busy", ""),
}


def migstream(*args: object) -> int:
    result = CliRunner().invoke(group, ["fuzz", *map(str, args)])
    assert result.exit_code in (0, 1), result.output
    return result.exit_code


def fuzz(target: str, out: Path, bugs: dict[str, tuple[str, str, str]], *options: object) -> dict[str, Known]:
    """Fuzz until each bug was found, in portions; return a finding of each."""
    begin: Sequence[object] = (
        "--target", target, "--corpus", EXAMPLES / "corpus", "--seed", SEED, "--timeout", 1, *options
    )  # fmt: skip
    for executions in range(AT_ONCE, AT_MOST + 1, AT_ONCE):
        migstream(*begin, "--out", out, "--executions", executions)
        begin = ("--resume",)
        minimised = [known for known in load_state(out).findings.values() if known.minimised]
        found = {bug: known for known in minimised if (bug := _bug(known, bugs))}
        if found.keys() == bugs.keys():
            return found
    pytest.fail(f"only {sorted(found)} after {AT_MOST} executions")


def _bug(known: Known, bugs: dict[str, tuple[str, str, str]]) -> str:
    """Return which bug a finding shows, or nothing where that is not clear."""
    signature, where = known.signature, " ".join(known.signature.where)
    shown = [
        bug
        for bug, (kind, title, function) in bugs.items()
        if signature.kind == kind and re.fullmatch(title, signature.title) and f":{function}" in f":{where}"
    ]
    return shown[0] if len(shown) == 1 else ""


def check_minimised(found: dict[str, Known], out: Path) -> None:
    for bug, known in found.items():
        assert known.records < 10, bug
        assert (out / known.signature.name / "stream").stat().st_size == known.octets


def test_the_five_bugs_of_the_reader_in_python_are_found_and_minimised(tmp_path: Path) -> None:
    target = f"{sys.executable} -I -S {EXAMPLES / 'reader.py'} {{}}"
    found = fuzz(target, tmp_path / "out", PYTHON_BUGS, "--memory", "256M")
    check_minimised(found, tmp_path / "out")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, to compile fuzz/examples/reader.c")
    reader = tmp_path_factory.mktemp("examples") / "reader"
    source = EXAMPLES / "reader.c"
    command: list[str | Path] = [
        "gcc",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-fsanitize=address",
        "-o",
        reader,
        source,
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "asan" in built.stderr:
        pytest.skip("needs libasan, which comes with gcc's own packages")
    assert built.returncode == 0, built.stderr
    assert not built.stderr
    return reader


def test_the_five_bugs_of_the_reader_in_c_are_found_and_minimised(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")  # half of the time of an execution
    found = fuzz(f"{compiled} {{}}", tmp_path / "out", C_BUGS, "--memory", "none")
    check_minimised(found, tmp_path / "out")


def test_the_bugs_are_where_the_comments_say() -> None:
    for name, bugs in (("reader.py", PYTHON_BUGS), ("reader.c", C_BUGS)):
        assert set(re.findall(r"BUG ([\w-]+):", (EXAMPLES / name).read_text())) == bugs.keys()


def test_sound_images_do_not_trip_the_readers(compiled: Path, tmp_path: Path) -> None:
    from migstream.conformance import load_vectors

    stream = tmp_path / "stream"
    for vector in load_vectors():
        if vector.name in ("hvm-image", "second-hvm-params"):
            stream.write_bytes(vector.octets)
            for target in ([sys.executable, EXAMPLES / "reader.py"], [compiled]):
                subprocess.run([*target, stream], check=True, capture_output=True)
