"""What other toolstacks put around a stream: libvirt's libxl driver, xend, xapi.

Sources: libvirt's src/libxl/libxl_conf.h (libxlSavefileHeader), Xen 4.4's tools/python/xen/xend
(XendCheckpoint.py), xapi's ocaml/xenopsd/lib/suspend_image.ml. ``xl``'s own file is in `xl`.
"""

from __future__ import annotations

from migstream.records.fields import octets, reserved, u32, u64
from migstream.records.schema import Declaration, Record

__all__ = [
    "LIBVIRT_MAGIC",
    "LIBVIRT_V2",
    "XAPI1_MAGIC",
    "XAPI_MAGIC",
    "XEND_MAGIC",
    "EndOfImage",
    "LibvirtHeader",
    "LibvirtXml",
    "Libxc",
    "LibxcLegacy",
    "Libxl",
    "QemuTrad",
    "QemuXen",
    "SegmentHeader",
    "Swtpm",
    "Swtpm0",
    "Varstored",
    "VgpuState",
    "Xapi1Header",
    "XapiHeader",
    "XapiSegment",
    "XendConfig",
    "XendHeader",
    "Xenops",
]

LIBVIRT_MAGIC = b"libvirt-xml\n \0 \r"
LIBVIRT_V2 = 2  # a libxl v2 stream follows; version 1: a legacy one
XEND_MAGIC = b"LinuxGuestRecord"
XAPI1_MAGIC = b"XenSavedDomain\n"
XAPI_MAGIC = b"XenSavedDomv2-\n"


class LibvirtHeader(Declaration):
    """Identifies a save image of libvirt's libxl driver. 64 octets, in the byte order of the host."""

    magic: bytes = octets("libvirt-xml, and line-ending probes", size=16, default=LIBVIRT_MAGIC)
    version: int = u32("2: a libxl v2 stream follows; 1: a legacy stream", default=LIBVIRT_V2)
    xml_len: int = u32("length of the domain XML, its NUL included", unit="octets")
    unused: bytes = reserved(40, default=bytes(40))


class LibvirtXml(Declaration):
    """The domain's config as libvirt has it."""

    xml: bytes = octets("the domain XML, with a NUL at its end")


class XendHeader(Declaration):
    """Identifies a save file of xend. Big-endian in every file; libxc's legacy stream follows the config."""

    magic: bytes = octets("LinuxGuestRecord", size=16, default=XEND_MAGIC)
    config_len: int = u32(
        "length of the config; signed for xend, which never writes a negative one", unit="octets"
    )


class XendConfig(Declaration):
    """The domain's config as xend has it."""

    config: bytes = octets("the domain's config, an S-expression without a NUL")


class Xapi1Header(Declaration):
    """Identifies a suspend image of xapi, version 1: libxc's legacy stream follows at once."""

    magic: bytes = octets("XenSavedDomain and a line feed", size=15, default=XAPI1_MAGIC)


class XapiHeader(Declaration):
    """Identifies a suspend image of xapi, version 2: segments follow."""

    magic: bytes = octets("XenSavedDomv2- and a line feed", size=15, default=XAPI_MAGIC)


class SegmentHeader(Declaration):
    """What precedes the body of each segment. Both fields are signed for xapi, and little-endian always."""

    type: int = u64("the segment's type")
    length: int = u64("length of the body; xapi writes 0 for a body that it does not measure", unit="octets")


class XapiSegment(Record, layer="xapi"):
    """Base of the segments of xapi's suspend image."""

    #: Whether the header's length says where the body ends; the others end as their own format says.
    measured = True


class Xenops(XapiSegment, code=0x0F, type="Xenops"):
    """What xapi knows about the VM: time, word size, and the VM's metadata."""

    config: bytes = octets("an S-expression: time, word_size, vm_str, xs_subtree")


class Libxc(XapiSegment, code=0xF0, type="Libxc"):
    """A libxc image follows, with headers of its own; the next segment stands behind its END."""

    measured = False


class Libxl(XapiSegment, code=0xF1, type="Libxl"):
    """A libxl stream follows. Reserved: xapi itself neither writes nor reads it."""

    measured = False


class LibxcLegacy(XapiSegment, code=0xF2, type="Libxc_legacy"):
    """A legacy libxc stream follows, with its QEMU tail."""

    measured = False


class QemuTrad(XapiSegment, code=0xF00, type="Qemu_trad"):
    """The state of the VM's QEMU, whichever it is."""

    state: bytes = octets("as QEMU writes it")


class QemuXen(XapiSegment, code=0xF01, type="Qemu_xen"):
    """The state of an upstream QEMU. Reserved: xapi itself neither writes nor reads it."""

    state: bytes = octets("as QEMU writes it")


class VgpuState(XapiSegment, code=0xF10, type="Demu"):
    """The state of a virtual GPU, written by its emulator, demu."""

    state: bytes = octets("in demu's own form; xapi writes length 0 and does not say where it ends")


class Varstored(XapiSegment, code=0xF11, type="Varstored"):
    """The UEFI variables."""

    state: bytes = octets("as varstored writes them")


class Swtpm0(XapiSegment, code=0xF12, type="Swtpm0"):
    """The state of a virtual TPM, as first releases wrote it."""

    state: bytes = octets("as swtpm writes it")


class Swtpm(XapiSegment, code=0xF13, type="Swtpm"):
    """The state of a virtual TPM."""

    state: bytes = octets("as swtpm writes it, in base64")


class EndOfImage(XapiSegment, code=0xFFFF, type="End"):
    """The suspend image ends here. No body."""

    measured = False
