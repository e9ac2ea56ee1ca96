"""The custom mutator: alone, and in the hands of AFL++ itself, which finds a planted bug with it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from migstream.fuzzing import afl
from migstream.fuzzing.mutator import Mutation
from migstream.fuzzing.tree import Tree
from tests import build

ROOT = Path(__file__).parents[1]
STREAM = build.libxl_stream()

#: A reader that aborts where a well framed PAGE_DATA record announces more entries than its body has octets.
READER = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned char stream[1 << 20];

int main(int argc, char **argv)
{
    FILE *file = argc > 1 ? fopen(argv[1], "rb") : stdin;
    size_t size = file ? fread(stream, 1, sizeof(stream), file) : 0, at = 40;

    if (size < 40 || memcmp(stream + 8, "XENF", 4) || stream[15] != 3)
        return 1;
    while (size - at >= 8) {
        uint32_t type, length, count;
        memcpy(&type, stream + at, 4);
        memcpy(&length, stream + at + 4, 4);
        at += 8;
        if (length > size - at)
            return 2;
        if (type == 1 && length >= 8) {
            memcpy(&count, stream + at, 4);
            if (count > length)
                abort();
        }
        if (type == 0)
            return length != 0;
        at += ((size_t)length + 7) & ~(size_t)7;
        if (at > size)
            return 2;
    }
    return 3;
}
"""


def test_mutations_follow_from_the_seed_and_the_order_of_calls() -> None:
    def run() -> list[bytes]:
        afl.init(7)
        made = [bytes(afl.fuzz(bytearray(STREAM), bytearray(build.image()), 1 << 20)) for _ in range(50)]
        afl.deinit()
        return made

    first = run()
    assert run() == first
    assert len(set(first)) > 40


def test_a_mutation_keeps_to_the_size_that_is_allowed() -> None:
    afl.init(1)
    assert all(len(afl.fuzz(bytearray(STREAM), None, 100)) <= 100 for _ in range(50))


def test_something_comes_back_always_for_afl_ends_over_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(afl, "mutate_one", lambda *_, **__: Mutation(b"", ("cut: to nothing",)))
    afl.init(1)
    assert afl.fuzz(bytearray(STREAM), None, 1 << 20) == STREAM


def test_most_mutations_are_still_framed() -> None:
    afl.init(1)
    made = [bytes(afl.fuzz(bytearray(STREAM), bytearray(build.image()), 1 << 20)) for _ in range(200)]
    assert sum("raw unframed" not in Tree.parse(octets).labels() for octets in made) > 120


def test_a_description_fits_a_file_name() -> None:
    afl.init(1)
    for _ in range(50):
        afl.fuzz(bytearray(STREAM), None, 1 << 20)
        told = afl.describe(20)
        assert len(told) <= 20
        assert not set(told) & set(b"/ :\n")
    assert afl.fuzz_count(bytearray(STREAM)) > 0


def needed(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; on Debian: apt install afl++")


def test_afl_finds_a_bug_behind_the_framing_with_it(tmp_path: Path) -> None:
    needed("afl-fuzz", "afl-cc")
    source, program = tmp_path / "reader.c", tmp_path / "reader"
    source.write_text(READER)
    subprocess.run(
        ["afl-cc", "-o", program, source],
        check=True,
        capture_output=True,
        env=os.environ | {"AFL_QUIET": "1"},
    )
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "image").write_bytes(build.image())
    settings = {
        "AFL_PYTHON_MODULE": "migstream.fuzzing.afl",
        "AFL_CUSTOM_MUTATOR_ONLY": "1",
        "AFL_BENCH_UNTIL_CRASH": "1",
        "AFL_NO_UI": "1",
        "AFL_NO_AFFINITY": "1",
        "AFL_SKIP_CPUFREQ": "1",
        "AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES": "1",
        "PYTHONPATH": str(ROOT),
    }
    places = ["-i", str(corpus), "-o", str(tmp_path / "out")]
    command = ["afl-fuzz", *places, "-s", "1", "-V", "300", "--", str(program), "@@"]
    environment = os.environ | settings
    # It ends with a signal of its own once it has a crash.
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=400)
    crashes = sorted((tmp_path / "out" / "default" / "crashes").glob("id:*"))
    assert crashes, done.stdout[-2000:] + done.stderr[-2000:]
    assert "libxc PAGE_DATA" in Tree.parse(crashes[0].read_bytes()).labels()
