"""What holds for all tests; and the tiers: what needs QEMU runs only when it is asked for."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings

# A deadline asserts on the clock, which a busy machine fails.
settings.register_profile("house", deadline=None)
settings.load_profile("house")

# What a shell starts in the background ignores this, and commands that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

QEMU = Path(__file__).with_name("qemu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--qemu", action="store_true", help="run the tests in tests/qemu too, on real machines")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "qemu: needs QEMU and the tiny guest; every test in tests/qemu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if QEMU in item.path.parents:
            item.add_marker(pytest.mark.qemu)
            if not config.getoption("--qemu"):
                item.add_marker(pytest.mark.skip(reason="real QEMU machines: run `make test-qemu`"))
