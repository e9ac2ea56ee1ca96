"""The rules: what each says, how grave it is, and the paragraph that it stands on.

``spec/rules.md`` is generated from this table. A rule judges by the specification; where Xen's own code
takes more than the specification allows, the rule is a warning and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["RULES", "Rule", "Severity"]


class Severity(StrEnum):
    """How grave a finding is."""

    ERROR = "error"  # the stream is not sound: a restore refuses it, or loses something
    WARNING = "warning"  # against the specification, but Xen's own restore takes it
    NOTE = "note"  # nothing wrong; worth knowing


@dataclass(frozen=True)
class Rule:
    """One rule. ``id`` never changes once released."""

    id: str
    severity: Severity
    title: str
    reference: str


_LIBXC = "libxc-migration-stream"
_LIBXL = "libxl-migration-stream"
_XL = "Xen tools/xl/xl.h, struct save_file_header"
_LIBVIRT = "libvirt src/libxl/libxl_conf.h, libxlSavefileHeader"
_XEND = "Xen 4.4 tools/python/xen/xend/XendCheckpoint.py"
_XAPI = "xapi ocaml/xenopsd/lib/suspend_image.ml"
_XAPI_RESTORE = "xapi ocaml/xenopsd/xc/domain.ml, restore_common"
E, W, N = Severity.ERROR, Severity.WARNING, Severity.NOTE

_TABLE = (
    # The xl file
    Rule("xl-mandatory-flags", E, "Mandatory flags other than bits 0 and 1 are not defined; xl refuses them", _XL),
    Rule("xl-not-stream-v2", E, "The flag for a libxl v2 stream (bit 1) is not set, though one follows", _XL),
    Rule("xl-optional-flags", W, "Optional flags are set; none is defined, and xl ignores them", _XL),
    Rule("xl-config-absent", E, "The file carries no domain config, which xl restore needs", _XL),
    Rule("xl-config-malformed", E, "The config is not the JSON object that the flags announce", _XL),
    Rule("xl-config-surplus", W, "Data follow the config inside the optional data; xl skips them", _XL),
    Rule("xl-without-libxl", E, "A libxc image stands directly in the xl file; xl expects a libxl stream", _XL),
    # Other envelopes
    Rule("libvirt-version", E, "The version of libvirt's save image is 1 or 2", _LIBVIRT),
    Rule("libvirt-not-stream-v2", E, "Version 1 announces a legacy stream, though another one follows", _LIBVIRT),
    Rule("libvirt-xml-absent", E, "The image carries no domain XML, which libvirt needs", _LIBVIRT),
    Rule("libvirt-xml-malformed", E, "The XML is a domain's, with a NUL at its end", _LIBVIRT),
    Rule("libvirt-without-libxl", E, "A libxc image stands directly in libvirt's; libvirt expects a libxl stream", _LIBVIRT),
    Rule("xend-config-malformed", E, "The config is not the S-expression that xend writes", _XEND),
    Rule("xapi-segment-unknown", E, "A segment of a type that is not defined; xapi refuses it", _XAPI),
    Rule("xapi-segment-unread", E, "Libxl and Qemu_xen are defined, but xapi's restore refuses them", _XAPI_RESTORE),
    Rule("xapi-segment-length", W, "A length where xapi writes 0 and reads none: the body ends as its own format says", _XAPI_RESTORE),
    Rule("xapi-xenops-malformed", E, "Xenops is an S-expression with time and word_size", _XAPI),
    Rule("xapi-image-absent", E, "A suspend image holds a libxc image; without one xapi restores nothing", _XAPI_RESTORE),
    # The libxl stream
    Rule("libxl-version", E, "The version of a libxl stream is 2", f"{_LIBXL}, Header"),
    Rule("libxl-big-endian", E, "A stream from an x86 or Arm host is little-endian; libxl refuses others", f"{_LIBXL}, Header"),
    Rule("libxl-options-reserved", W, "Option bits 2-31 are reserved, zero; libxl ignores them", f"{_LIBXL}, Header"),
    Rule("libxl-converted", N, "The stream was converted from a legacy one", f"{_LIBXL}, Header"),
    Rule("libxl-context-absent", E, "A libxl stream holds one LIBXC_CONTEXT", f"{_LIBXL}, LIBXC_CONTEXT"),
    Rule("libxl-context-repeated", E, "A second LIBXC_CONTEXT", f"{_LIBXL}, LIBXC_CONTEXT"),
    Rule("libxl-checkpoint-end", E, "CHECKPOINT_END answers a libxc CHECKPOINT", f"{_LIBXL}, CHECKPOINT_END"),
    Rule("libxl-checkpoint-open", E, "libxl's records of a checkpoint end with CHECKPOINT_END", f"{_LIBXL}, CHECKPOINT_END"),
    Rule("libxl-checkpoint-state", E, "CHECKPOINT_STATE belongs to COLO: one control id of 0 to 3, after a checkpoint", f"{_LIBXL}, CHECKPOINT_STATE"),
    Rule("emulator-foreign", E, "Emulator records belong to HVM guests; libxl refuses them for others", f"{_LIBXL}, Emulator Records"),
    Rule("emulator-before-image", E, "Emulator records follow the libxc image that they belong to", f"{_LIBXL}, Emulator Records"),
    Rule("emulator-unknown", W, "Emulator ids from 3 on are reserved; libxl passes the data to its QEMU", f"{_LIBXL}, Emulator Records"),
    Rule("emulator-empty", W, "An EMULATOR_CONTEXT without state, or xenstore data without a pair", f"{_LIBXL}, EMULATOR_CONTEXT"),
    Rule("xenstore-malformed", E, "Xenstore data are pairs of strings, each ended by NUL", f"{_LIBXL}, EMULATOR_XENSTORE_DATA"),
    Rule("xenstore-characters", W, "Xenstore keys are alphanumeric or one of -/_@; values are readable ASCII; libxl takes any", f"{_LIBXL}, EMULATOR_XENSTORE_DATA"),
    # Headers of a libxc image
    Rule("image-version", E, "The version of a libxc image is 2 or 3", f"{_LIBXC}, Image Header"),
    Rule("image-big-endian", E, "An image from an x86 or Arm host is little-endian; Xen refuses others", f"{_LIBXC}, Image Header"),
    Rule("image-options-reserved", W, "Option bits 1-15 are reserved, zero; Xen ignores them", f"{_LIBXC}, Image Header"),
    Rule("domain-type", E, "The guest type is 1 (x86 PV) or 2 (x86 HVM)", f"{_LIBXC}, Domain Header"),
    Rule("domain-page-shift", E, "The page size of an x86 guest is 4096 (page_shift 12)", f"{_LIBXC}, Domain Header"),
    Rule("domain-converted", N, "The image was converted from a legacy stream (xen_major is 0)", f"{_LIBXC}, Domain Header"),
    # Framing of records, in both layers
    Rule("stream-damaged", E, "The stream cannot be framed or read any further", f"{_LIBXC}, Overview"),
    Rule("stream-legacy", E, "A legacy (version 1) stream, which no present restore takes; convert makes one of version 3", f"{_LIBXC}, Legacy Images"),
    Rule("stream-truncated", E, "The input ends before the stream does", f"{_LIBXC}, END"),
    Rule("stream-ends-in-checkpoint", W, "The input ends inside a record behind a complete checkpoint; Xen's restore fails over to the checkpoint", f"{_LIBXC}, CHECKPOINT"),
    Rule("stream-ends-at-checkpoint", N, "The input ends behind a complete checkpoint, without END; what follows the checkpoint is void", f"{_LIBXC}, CHECKPOINT"),
    Rule("after-end", W, "Data follow the END record, which shall be the last; Xen never reads them", f"{_LIBXC}, END"),
    Rule("after-end-xl-message", N, "xl's own closing message follows the END record, as in a captured migration", "Xen tools/xl/xl.h, migrate_permission_to_go"),
    Rule("record-length", E, "A record's body is at most 128 MiB", "Xen tools/libs/guest/xg_sr_stream_format.h, REC_LENGTH_MAX"),
    Rule("record-padding", W, "Padding is zero; Xen ignores it", f"{_LIBXC}, Records"),
    Rule("record-unknown", E, "A mandatory record of a type that the specification does not define", f"{_LIBXC}, Records"),
    Rule("record-optional", N, "An optional record (bit 31) of a type that is not known; a restore ignores it", f"{_LIBXC}, Records"),
    # Bodies
    Rule("body-malformed", E, "The body does not fit the record's fields", f"{_LIBXC}, Records"),
    Rule("body-length", E, "The body is of the length that its type and fields ask for", f"{_LIBXC}, Records"),
    Rule("body-unusual", W, "The body is far larger than any known saver's; its content was not checked", f"{_LIBXC}, Records"),
    Rule("body-surplus", W, "The body is longer than its fields; Xen ignores the rest", f"{_LIBXC}, Records"),
    Rule("reserved-field", W, "A reserved field is zero on save; Xen ignores it on restore", f"{_LIBXC}, Fields"),
    Rule("page-data-count", E, "PAGE_DATA describes at least one PFN", f"{_LIBXC}, PAGE_DATA"),
    Rule("page-data-length", E, "PAGE_DATA has one page for each PFN whose type has data, and nothing else", f"{_LIBXC}, PAGE_DATA"),
    Rule("page-type", E, "Page types 5 to 8 are reserved; restoring unrecognised page types shall fail", f"{_LIBXC}, PAGE_DATA"),
    Rule("page-reserved-bits", W, "Bits 52-59 of an entry are reserved, zero; Xen ignores them", f"{_LIBXC}, PAGE_DATA"),
    Rule("page-duplicate", W, "A PFN occurs twice in one record; Xen keeps the last", f"{_LIBXC}, PAGE_DATA"),
    Rule("page-table-in-hvm", W, "Page table types mean nothing in an HVM image; Xen takes the pages as normal ones", f"{_LIBXC}, PAGE_DATA"),
    Rule("page-beyond-p2m", E, "A PV guest's PFNs lie within the range of X86_PV_P2M_FRAMES", f"{_LIBXC}, X86_PV_P2M_FRAMES"),
    Rule("pv-info", E, "A PV guest is 32-bit with 3 levels of page tables (4, 3) or 64-bit with 4 (8, 4)", f"{_LIBXC}, X86_PV_INFO"),
    Rule("p2m-range", E, "p2m_start_pfn is not above p2m_end_pfn, and the end is not PFN 0", f"{_LIBXC}, X86_PV_P2M_FRAMES"),
    Rule("p2m-length", E, "One PFN for each frame of the list from start to end", f"{_LIBXC}, X86_PV_P2M_FRAMES"),
    Rule("vcpu-context-size", E, "A vCPU's context is of the size that its hypercall uses", f"{_LIBXC}, X86_PV_VCPU_BASIC, EXTENDED, XSAVE, MSRS"),
    Rule("vcpu-empty", W, "A vCPU record without context should be elided; Xen 4.6 to 4.8 wrote them, restore ignores them", f"{_LIBXC}, Errata 1"),
    Rule("hvm-params-empty", W, "HVM_PARAMS without a parameter should be elided; Xen 4.6 to 4.8 wrote them, restore ignores them", f"{_LIBXC}, Errata 1"),
    Rule("hvm-param-unknown", W, "A parameter that Xen's headers do not define; the hypervisor may refuse it", "Xen public/hvm/params.h"),
    Rule("hvm-param-repeated", W, "A parameter occurs twice in one record; the last counts", f"{_LIBXC}, HVM_PARAMS"),
    Rule("tsc-mode", W, "A TSC mode that Xen does not define; the hypervisor may refuse it", f"{_LIBXC}, X86_TSC_INFO"),
    # Layout of an image
    Rule("layout-foreign", E, "A record of the other guest type", f"{_LIBXC}, Layout"),
    Rule("layout-back-channel", E, "CHECKPOINT_DIRTY_PFN_LIST goes on the back channel only", f"{_LIBXC}, CHECKPOINT_DIRTY_PFN_LIST"),
    Rule("layout-deprecated", E, "TOOLSTACK is deprecated; no restore takes it", f"{_LIBXC}, TOOLSTACK (deprecated)"),
    Rule("layout-order", E, "A record stands before one that it depends on", f"{_LIBXC}, Layout"),
    Rule("layout-order-tolerated", W, "A record stands before one that shall precede it; Xen's restore takes it", f"{_LIBXC}, Layout"),
    Rule("layout-repeated", E, "A record that may occur once occurs again", f"{_LIBXC}, Layout"),
    Rule("layout-repeated-tolerated", W, "A record occurs again in one state; Xen keeps the last", f"{_LIBXC}, Layout"),
    Rule("layout-static-late", W, "Static data behind STATIC_DATA_END; Xen takes the record and never applies it", f"{_LIBXC}, STATIC_DATA_END"),
    Rule("layout-missing", E, "A record that the image must have is absent", f"{_LIBXC}, Layout"),
    Rule("layout-missing-usual", W, "A record is absent without which a guest is not whole; the specification does not ask for it", f"{_LIBXC}, Layout"),
    Rule("static-data-inferred", N, "A version 2 image has no STATIC_DATA_END; a restore infers its place here", f"{_LIBXC}, v3 compat with v2"),
    Rule("static-data-missing", N, "No CPUID or MSR policy; the restoring toolstack has to make one up", f"{_LIBXC}, x86 PV Guest / x86 HVM Guest"),
    Rule("static-data-in-v2", W, "A record of version 3 in an image of version 2; Xen's restore takes it", f"{_LIBXC}, v3 compat with v2"),
)  # fmt: skip

#: Every rule by its id.
RULES: dict[str, Rule] = {rule.id: rule for rule in _TABLE}
