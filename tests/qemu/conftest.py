"""Machines for the tests: the tiny guest is booted once, and each test's machine starts from that state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.qemu.image import CannotBuildError, Image, build
from tests.qemu.machine import TURN, Machine, boot_flags, flags, machine

#: Makes a machine that lives as long as the test: its name (a folder), its flags (`flags()`), and whether
#: it waits for a migration (``-S -incoming defer``) or stays empty and paused.
Start = Callable[..., Machine]


@pytest.fixture(scope="session")
def image() -> Image:
    try:
        return build()
    except CannotBuildError as exc:
        pytest.fail(str(exc))


@pytest.fixture(scope="session")
def booted(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the state of a running guest, as QEMU's own migration writes it."""
    folder = tmp_path_factory.mktemp("booted")
    with machine(folder / "machine", [*flags(), *boot_flags(image)]) as guest:
        guest.wait_for_count(TURN)  # from here on it checks all that it overwrites
        guest.save(folder / "state")
    return folder / "state"


@pytest.fixture
def start(image: Image, tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def start(name: str, made_of: list[str] | None = None, *, incoming: bool = True) -> Machine:
            waiting = ["-S", *(["-incoming", "defer"] if incoming else [])]
            options = [*(made_of or flags()), *boot_flags(image), *waiting]
            return stack.enter_context(machine(tmp_path / name, options))

        yield start


@pytest.fixture
def source(start: Start, booted: Path) -> Machine:
    """A running guest."""
    guest = start("source")
    guest.load(booted)
    guest.command("cont")
    guest.events()
    return guest


@pytest.fixture
def destination(start: Start) -> Machine:
    """A machine like `source` that waits for a migration."""
    return start("destination")
