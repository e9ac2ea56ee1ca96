"""What a kind of guest declares of itself, and the strings that name guests, ``KIND:WHAT,option=value,...``.

A file of its own for each kind holds a `GuestKind`; `registry` finds it by name. Those files import numpy and
whatever else they need inside functions, so that help can be shown without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from migstream.errors import GuestError
from migstream.guests.protocols import PAGE_SIZE, RestoreTarget, SaveSource
from migstream.records.libxc import GuestType

__all__ = ["GuestKind", "GuestSpec", "GuestSpecError", "Option", "parse_size"]

E = TypeVar("E", bound=Enum)

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}  # binary, as in xl's memory options
LARGEST = 1 << 60  # octets: far beyond every guest, and still arithmetic that fits anywhere


class GuestSpecError(GuestError):
    """A string that should name a guest does not; the message has an example that does."""


@dataclass(frozen=True)
class Option:
    """One ``name=value`` of a kind; ``example`` is such a value."""

    name: str
    example: str
    help: str


def parse_size(text: str, example: str = "64M") -> int:
    """Return the octets that ``text`` says: a whole number with K, M, G or T behind it, or none (octets)."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if not (number.isascii() and number.isdigit()) or unit not in UNITS:
        raise GuestSpecError(f"{text!r} is no size; write a whole number and K, M, G or T, such as {example}")
    size = int(number) * UNITS[unit] if len(number) < 20 else LARGEST
    if not 0 < size < LARGEST:
        raise GuestSpecError(f"{text!r} is not a size that a guest can have; one is {example}")
    return size


@dataclass(frozen=True)
class GuestSpec:
    """A guest as the user named it: ``what`` it is (a size, a file), and the options given.

    The getters return the value of an option, or the default where it was not given, and raise
    `GuestSpecError` with the option's example where the value does not fit.
    """

    kind: GuestKind
    what: str
    options: Mapping[str, str]

    def size(self, name: str, default: int) -> int:
        """Return an option that is a size, in octets."""
        text = self.options.get(name)
        if text is None:
            return default
        try:
            return parse_size(text)
        except GuestSpecError:
            raise self._unfit(name, "a size") from None

    def integer(self, name: str, default: int) -> int:
        """Return an option that is a whole number, 0 or more."""
        text = self.options.get(name, str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise self._unfit(name, "a whole number")
        return int(text)

    def choice(self, name: str, default: E) -> E:
        """Return an option that is the value of a member of ``default``'s enumeration."""
        text = self.options.get(name)
        if text is None:
            return default
        members = {str(member.value): member for member in type(default)}
        if text not in members:
            raise self._unfit(name, f"one of {', '.join(members)}")
        return members[text]

    def yes(self, name: str, default: bool) -> bool:
        """Return an option that is yes or no."""
        text = self.options.get(name, "yes" if default else "no")
        if text not in ("yes", "no"):
            raise self._unfit(name, "yes or no")
        return text == "yes"

    def guest_type(self, default: GuestType) -> GuestType:
        """Return the option ``guest-type``, which nearly every kind has."""
        text = self.options.get("guest-type", default.name.lower())
        if text.upper() not in GuestType.__members__:
            raise self._unfit("guest-type", "pv or hvm")
        return GuestType[text.upper()]

    def pages(self) -> int:
        """Return `what` as a size in whole pages."""
        size = parse_size(self.what)
        if size % PAGE_SIZE:
            raise GuestSpecError(f"{self.kind.name}:{self.what} is not whole pages of 4K")
        return size // PAGE_SIZE

    def _unfit(self, name: str, expected: str) -> GuestSpecError:
        option = next(option for option in self.kind.options if option.name == name)
        return GuestSpecError(
            f"{name}={self.options[name]} does not fit {self.kind.name}: expected {expected}, such as "
            f"{name}={option.example}"
        )


SourceMaker = Callable[[GuestSpec, GuestType], AbstractContextManager[SaveSource]]
TargetMaker = Callable[[GuestSpec, GuestType], AbstractContextManager[RestoreTarget]]


@dataclass(frozen=True)
class GuestKind:
    """A kind of guest. ``what`` says what stands behind its name, such as ``SIZE``; ``help`` is one line.

    The makers are given the guest type that the caller asks for; an option may override it. What they
    make is for the body of a ``with`` statement: a target that is left without `complete` leaves nothing.
    ``guest_type`` is what all guests of a kind are, if they are all of one type.
    """

    name: str
    what: str
    example: str
    help: str
    source: SourceMaker | None = None
    target: TargetMaker | None = None
    options: tuple[Option, ...] = field(default=())
    guest_type: GuestType | None = None

    def parse(self, text: str) -> GuestSpec:
        """Return what follows ``name:``, taken apart. Raises `GuestSpecError`.

        Options are taken from the end, so a file name may have commas.
        """
        options: dict[str, str] = {}
        while "," in text:
            head, _, last = text.rpartition(",")
            name, is_option, value = last.partition("=")
            if not is_option:
                break
            if name not in (option.name for option in self.options):
                known = ", ".join(f"{option.name}={option.example}" for option in self.options)
                raise GuestSpecError(f"{self.name} has no option {name!r}; it has, for example, {known}")
            if name in options:
                raise GuestSpecError(f"{name}= is given twice for {self.name}; give it once")
            options[name] = value
            text = head
        if not text:
            raise GuestSpecError(f"{self.name}: needs {self.what} behind it, such as {self.example}")
        return GuestSpec(self, text, options)
