"""What the two engines share: stream types, what a checkpoint callback may answer, missing static data.

The numbers are Xen's (tools/include/xenguest.h), so that they mean the same in logs of either.
"""

from __future__ import annotations

from enum import Enum, IntEnum, IntFlag

__all__ = ["CheckpointAction", "Missing", "StreamType"]


class StreamType(Enum):
    """What a stream is for (``xc_stream_type_t``)."""

    PLAIN = "plain"
    REMUS = "remus"
    COLO = "colo"

    @property
    def checkpointed(self) -> bool:
        """Whether the stream holds checkpoints: more than one consistent state, one after the other."""
        return self is not StreamType.PLAIN


class CheckpointAction(IntEnum):
    """What the receiver does at a checkpoint (``XGR_CHECKPOINT_*``)."""

    ERROR = 0
    CONTINUE = 1
    FAILOVER = 2


class Missing(IntFlag):
    """Static data that a stream lacked, for the receiver to make up (``XGR_SDD_MISSING_*``)."""

    NONE = 0
    CPUID = 1
    MSR = 2
