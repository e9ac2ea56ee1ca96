"""What the two ends of a migration say to each other, declared: ``spec/transport.md`` has it in words."""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

from migstream.records.fields import octets, reserved, u8, u16, u32, u64
from migstream.records.schema import Declaration

__all__ = [
    "LONGEST_BODY",
    "MAGIC",
    "MESSAGES",
    "VERSION",
    "Accept",
    "Checksum",
    "Chunk",
    "Compression",
    "Content",
    "Failed",
    "Framing",
    "Go",
    "GuestState",
    "Kind",
    "Loaded",
    "Message",
    "MessageHead",
    "Offer",
    "Refuse",
    "Running",
    "text",
]

MAGIC = b"MIGT"
VERSION = 1
LONGEST_BODY = 8192  # octets, of what is taken; more than any message needs
LONGEST_TEXT = 4096  # octets of a reason or of warnings; what is beyond is cut off


class Kind(IntEnum):
    """What a message is."""

    OFFER = 1
    ACCEPT = 2
    REFUSE = 3
    LOADED = 4
    FAILED = 5
    GO = 6
    RUNNING = 7


class Framing(IntEnum):
    """How the stream goes over the connection."""

    BARE = 0
    CHUNKS = 1


class Compression(IntEnum):
    """What the contents of chunks may be compressed by."""

    NONE = 0
    ZSTD = 1


class Checksum(IntEnum):
    """What each chunk is guarded by."""

    NONE = 0
    CRC32C = 1


class GuestState(IntEnum):
    """What became of the guest at the destination."""

    COMPLETE = 0
    RUNNING = 1
    PAUSED = 2


class Content(IntEnum):
    """What stands in a chunk."""

    END = 0
    PLAIN = 1
    ZSTD = 2


class MessageHead(Declaration):
    """Stands before every message."""

    magic: bytes = octets("`MIGT`", size=4, default=MAGIC)
    kind: int = u16("what the message is", names=Kind)
    length: int = u16("octets of the body", unit="octets")


#: Kind of message -> the class that declares its body.
MESSAGES: dict[int, type[Message]] = {}


class Message(Declaration):
    """Base of the bodies of messages."""

    kind: ClassVar[Kind]

    def __init_subclass__(cls, *, kind: Kind, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = kind
        MESSAGES[kind] = cls

    def with_head(self) -> bytes:
        """Return the message as it is sent."""
        body = self.build()
        return MessageHead(kind=self.kind, length=len(body)).build() + body


class Offer(Message, kind=Kind.OFFER):
    """The sender's first word: what it would send, and how."""

    version: int = u16("version of this protocol", default=VERSION)
    framing: int = u8(
        "how the stream is sent; CHUNKS if anything but NONE follows, or over TLS", names=Framing
    )
    compression: int = u8("of the chunks", names=Compression)
    checksum: int = u8("of each chunk", names=Checksum)
    guest_type: int = u8("1 PV, 2 HVM, as in the domain header")
    reserved1: int = reserved(2, default=0)


class Accept(Message, kind=Kind.ACCEPT):
    """The receiver's answer: go ahead."""


class Refuse(Message, kind=Kind.REFUSE):
    """The receiver's other answer; the connection ends behind it."""

    reason: bytes = octets("why, for the user: UTF-8")


class Loaded(Message, kind=Kind.LOADED):
    """The receiver's word behind the stream: the guest is complete, and stands still."""

    pages: int = u64("pages received with their content")
    warnings: bytes = octets("what was tolerated, a line each: UTF-8")


class Failed(Message, kind=Kind.FAILED):
    """The receiver cannot go on. The guest does not run there, and never will."""

    reason: bytes = octets("why, for the user: UTF-8")


class Go(Message, kind=Kind.GO):
    """The sender gives the guest up: from here on it is the receiver's."""


class Running(Message, kind=Kind.RUNNING):
    """The receiver's last word."""

    state: int = u8("what became of the guest; COMPLETE where it is none that runs", names=GuestState)
    reserved1: bytes = reserved(7, default=bytes(7))


class Chunk(Declaration):
    """Stands before each piece of a stream that is sent in chunks."""

    content: int = u32("what follows", names=Content)
    stored: int = u32("octets that follow, at most 1 MiB and 1 KiB", unit="octets")
    expanded: int = u32("octets of the stream that they hold, at most 1 MiB", unit="octets")
    crc32c: int = u32("CRC-32C of the 12 octets before and of the stored ones; 0 without a checksum")


def text(words: str) -> bytes:
    """Return ``words`` as they go into a message."""
    return words.encode("utf-8", "replace")[:LONGEST_TEXT]
