"""The commands as a user meets them: output, errors, exit codes."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from migstream.cli import COMMANDS, help_text
from migstream.cli.group import group
from tests import build
from tests.build import DATA, SHARED

REAL = DATA / "tinypv-save-p.xl.zst"


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(group, [str(arg) for arg in args])


def migstream(*args: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the command line in a process of its own."""
    code = "from migstream.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *args], input=input, capture_output=True, check=False, timeout=60
    )


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole.xl"
    path.write_bytes(build.xl(build.libxl_stream()))
    return path


def test_each_command_has_the_help_line_that_the_group_shows() -> None:
    for name, line in COMMANDS.items():
        command = import_module(f"migstream.cli.{name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        assert command.get_short_help_str(limit=200) == line
        shown = run(name, "--help")
        assert shown.exit_code == 0
        assert "Examples:" in shown.output


def test_inspect_says_of_an_image_that_xen_did_not_make_what_it_is_of(tmp_path: Path) -> None:
    path = tmp_path / "image"
    shape = struct.pack("<IIQQQ", 1, 2, 64 << 20, 64 << 20, 0)
    origin = build.record(0xCD530001, shape + b"version\x007.2\0evil\0\x1b[31m\0")
    path.write_bytes(build.header() + origin + build.record(build.STATIC_DATA_END) + build.record(build.END))
    shown = run("inspect", path).output
    assert "HVM guest, of QEMU, " in shown
    assert "Xen" not in shown
    assert "origin       QEMU, 2 vCPUs, memory of 64.0 MiB\n               version: 7.2\n" in shown
    assert "evil: \\x1b[31m\n" in shown


def test_help_imports_nothing_heavy() -> None:
    heavy = ("click", "numpy", "rich", "zstandard", "json", "migstream.records")
    code = (
        f"import sys; from migstream.cli import main; main(); print([m for m in {heavy} if m in sys.modules])"
    )
    for option in ("--help", "-h"):
        shown = subprocess.run(
            [sys.executable, "-c", code, option], capture_output=True, check=True, text=True
        )
        assert shown.stdout == f"{help_text()}[]\n"
    assert run("--help").output == help_text()


def test_inspect_and_verify_of_plain_runs_do_without_numpy(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    runs = [build.page_data(list(range(at, at + 3)), build.page(7) * 3) for at in (0, 3, 6)]
    path.write_bytes(
        build.header() + build.record(build.STATIC_DATA_END) + b"".join(runs) + build.record(build.END)
    )
    code = (
        "import sys; from migstream.cli.group import group; group(sys.argv[1:], standalone_mode=False); "
        "print([m for m in ('numpy', 'rich') if m in sys.modules])"
    )
    for args in (["inspect"], ["verify", "-q"]):
        shown = subprocess.run(
            [sys.executable, "-c", code, *args, str(path)], capture_output=True, check=True, text=True
        )
        assert shown.stdout.splitlines()[-1] == "[]"


def test_inspect_shows_layers_guest_pages_and_config() -> None:
    shown = run("inspect", REAL)
    assert shown.exit_code == 0
    for text in ("xl save file, PV guest, Xen 4.17", "64-bit, 4 levels", "L4TAB_PIN", "name       tiny"):
        assert text in shown.output


def test_inspect_records_is_one_line_each_with_offsets() -> None:
    shown = run("inspect", "--records", REAL)
    lines = shown.output.splitlines()
    assert len(lines) == 13
    assert (
        lines[1].split()[:5] == ["1", "933", "libxc", "X86_PV_INFO", "8"]
        or lines[1].split()[3] == "X86_PV_INFO"
    )
    assert lines[1].split()[:5] == ["1", "957", "libxc", "X86_PV_INFO", "8"]
    assert "guest_width=8 pt_levels=4" in lines[1]


def test_inspect_jsonl_streams_records_then_the_summary(whole: Path) -> None:
    lines = [json.loads(line) for line in run("inspect", "--jsonl", whole).output.splitlines()]
    assert [line["record"] for line in lines[:-1]] == list(range(len(lines) - 1))
    assert lines[-1]["schema"] == "migstream-inspect-1"
    params = next(line for line in lines if line.get("type") == "HVM_PARAMS")
    assert params["fields"]["params"] == [{"index": 1, "index_name": "STORE_PFN", "value": 0xFEFFC}]


def test_inspect_config_prints_the_config_alone(whole: Path) -> None:
    assert json.loads(run("inspect", "--config", whole).output) == {"c_info": {"name": "guest"}}


def test_inspect_of_a_cut_file_shows_what_there_is_then_the_error(whole: Path) -> None:
    whole.write_bytes(whole.read_bytes()[:-30])
    shown = migstream("inspect", str(whole))
    assert shown.returncode == 1
    assert b"PAGE_DATA" in shown.stdout
    assert b"damaged" in shown.stdout
    assert shown.stderr.count(b"\n") == 1
    assert b"layer libxl" in shown.stderr


def test_verify_says_one_line_for_a_sound_stream(whole: Path) -> None:
    shown = run("verify", REAL)
    assert (shown.exit_code, shown.output) == (0, f"{REAL}: sound\n")
    assert run("verify", "-q", REAL).output == ""


def test_verify_json_has_the_documented_keys(tmp_path: Path) -> None:
    path = tmp_path / "more"
    path.write_bytes(build.image() + b"more")
    shown = run("verify", "--json", path)
    verdict = json.loads(shown.output)
    assert (shown.exit_code, verdict["sound"]) == (0, True)
    finding = next(f for f in verdict["findings"] if f["rule"] == "after-end")
    assert finding.keys() == {"rule", "severity", "offset", "layer", "record", "message", "reference"}
    assert (finding["severity"], finding["offset"]) == ("warning", len(build.image()))
    assert run("verify", "--strict", path).exit_code == 1


def test_verify_of_a_pipe(whole: Path) -> None:
    shown = migstream("verify", "-", input=whole.read_bytes())
    assert shown.returncode == 0
    assert b"-: sound" in shown.stdout


def test_verify_lists_its_rules() -> None:
    shown = run("verify", "--rules")
    assert shown.exit_code == 0
    assert "page-type" in shown.output


LEGACY_PV = (0x400).to_bytes(8, "little") + b"\xff" * 4 + bytes(60)
BAD = {
    "empty": (b"", "the input is empty"),
    "text": (b"This is not a stream.\n", "text: "),
    "legacy": (LEGACY_PV, "legacy (version 1) libxc stream"),
    "elf": (b"\x7fELF" + bytes(60), "an ELF file"),
    "count": (
        build.header() + build.record(build.STATIC_DATA_END) + build.record(1, b"\xff" * 4 + bytes(12)),
        "count is 4294967295",
    ),
    "length": (build.header() + b"\x09\0\0\0\xff\xff\xff\xff", "the input ends after 0 of the 4294967295"),
    "config": (build.xl(b"")[:44] + b"\xff\xff\xff\xff" + bytes(64), "4294967295 octets of optional data"),
}


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_clear_error(command: str, kind: str, tmp_path: Path) -> None:
    octets, message = BAD[kind]
    path = tmp_path / kind
    path.write_bytes(octets)
    shown = migstream(command, str(path))
    assert shown.returncode == 1
    said = (shown.stdout + shown.stderr).decode()
    assert message in said
    assert "offset" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_cannot_be_opened_is_an_error_too(command: str, tmp_path: Path) -> None:
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "absent", "No such file or directory")):
        shown = migstream(command, str(path))
        assert shown.returncode == 1
        assert shown.stderr.decode() == f"migstream: {path}: {message}\n"


def test_an_output_that_cannot_be_made_is_named(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "absent" / "out.xl"
    for args in (["convert", str(whole), str(out), "--to", "xl"], ["save", "model:1M", str(out)]):
        shown = migstream(*args)
        assert (shown.returncode, shown.stderr.decode()) == (
            1,
            f"migstream: {out}: No such file or directory\n",
        )


def test_what_is_no_stream_is_told_without_an_empty_table(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("no stream at all\n")
    assert migstream("inspect", str(path)).stdout.decode() == f"{path}: no migration stream\n"


def test_usage_errors_exit_2() -> None:
    for args in (
        ["inspect"],
        ["verify"],
        ["inspect", "--json", "--records", "x"],
        ["frobnicate"],
        ["verify", "fd:x"],
    ):
        assert run(*args).exit_code == 2


def test_control_characters_never_reach_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b[2J\u202e\r"
    emulator = bytes([2, 0, 0, 0, 0, 0, 0, 0])
    content = build.libxl(
        build.record(build.LIBXC_CONTEXT),
        build.image(),
        build.record(build.XENSTORE_DATA, emulator + f"k{evil}\0v{evil}\0".encode()),
        build.record(build.END),
    )
    config = json.dumps({"c_info": {"name": f"n{evil}"}}, ensure_ascii=False).encode() + b"\0"
    path = tmp_path / f"evil{evil}.xl"
    path.write_bytes(build.xl(content, config=config))
    for args in (["inspect"], ["inspect", "--records"], ["inspect", "--json"], ["inspect", "--jsonl"],
                 ["inspect", "--config"], ["verify", "-v"], ["verify", "--json"]):  # fmt: skip
        shown = migstream(*args, str(path))
        said = (shown.stdout + shown.stderr).decode()
        assert not {"\x1b", "\u202e", "\r"} & set(said), args
        assert shown.returncode == 0
    path.write_bytes(path.read_bytes()[:-8])
    assert b"\x1b" not in migstream("inspect", str(path)).stderr


def test_a_reader_of_our_output_may_leave_early() -> None:
    code = "from migstream.cli import main; main()"
    pipeline = (
        f"{sys.executable} -c '{code}' inspect --records {DATA / 'tinypv-migrate-live.xl.zst'} | head -1"
    )
    shown = subprocess.run(["sh", "-c", pipeline], capture_output=True, check=True)
    assert shown.stderr == b""


def test_memory_stays_flat_whatever_the_stream(tmp_path: Path) -> None:
    """A sparse file stands for a large stream: 4 GiB of pages, and a body of 128 MiB."""
    path = tmp_path / "large"
    with path.open("wb") as out:
        out.write(build.header() + build.record(build.STATIC_DATA_END))
        for first in range(0, 1 << 20, 1024):
            head = build.page_data(list(range(first, first + 1024)), b"")
            out.write(head[:4] + (8 + 8 * 1024 + 4096 * 1024).to_bytes(4, "little") + head[8:])
            out.seek(4096 * 1024, os.SEEK_CUR)
        out.write(b"\x09\0\0\0" + (128 << 20).to_bytes(4, "little"))
        out.seek(128 << 20, os.SEEK_CUR)
        out.write(build.record(build.END))
    code = (
        "import resource, sys, numpy; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "from migstream.cli.group import group\n"
        "try: group(sys.argv[1:], standalone_mode=False)\n"
        "except SystemExit: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file=sys.stderr)"
    )
    for command in ("inspect", "verify"):
        shown = subprocess.run(
            [sys.executable, "-c", code, command, str(path)], capture_output=True, check=True, text=True
        )
        grown_kib = int(shown.stderr.split()[-1])
        assert grown_kib < 64 << 10


@pytest.mark.skipif(not SHARED.exists(), reason="the captures beside the project are absent")
def test_every_real_capture_inspects_and_verifies_sound() -> None:
    captures = sorted((SHARED / "streams").glob("*.xl.zst"))
    assert captures
    for path in captures:
        assert run("verify", path).exit_code == 0, path
        assert run("inspect", path).exit_code == 0, path
