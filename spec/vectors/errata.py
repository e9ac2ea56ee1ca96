"""Known errata: where a specification, what Xen writes and what Xen takes differ. Each has a case at least.

A case names one as its ``reference``. Where libxenguest's own answer is a defect (a crash, or a refusal of
what the specification allows), the corpus asks for what the specification says.
"""

from __future__ import annotations

__all__ = ["ERRATA"]

_ZERO = (
    "libxc-migration-stream, Errata 1: Xen 4.6 to 4.8 wrote records without content, "
    "which a restore ignores: "
)

ERRATA = {
    "empty HVM_PARAMS": _ZERO + "HVM_PARAMS",
    "empty VCPU_EXTENDED": _ZERO + "X86_PV_VCPU_EXTENDED",
    "empty VCPU_XSAVE": _ZERO + "X86_PV_VCPU_XSAVE",
    "empty VCPU_MSRS": _ZERO + "X86_PV_VCPU_MSRS",
    "params behind context": "Xen writes HVM_PARAMS behind HVM_CONTEXT, though libxc-migration-stream, "
    "x86 HVM Guest, asks for the other order",
    "checkpoint state": "libxl-migration-stream draws CHECKPOINT_STATE with 8 octets; "
    "libxl writes 4 and padding",
    "page shift 44": "libxenguest takes page_shift 44 for 12, by an overflow; it has to be refused",
    "pages before p2m": "libxenguest crashes on PAGE_DATA for PFN 0 before X86_PV_P2M_FRAMES; refuse it",
    "p2m ends at 0": "libxenguest crashes on X86_PV_P2M_FRAMES that end at PFN 0; refuse it",
    "table entry too high": "libxenguest crashes on a page-table entry above the highest PFN; refuse it",
    "PFN 2^36": "libxenguest allocates a bitmap of 8 GiB for an HVM PFN of 2^36; refuse it before that",
    "static data never told": "libxenguest never calls static_data_done for a stream with neither PAGE_DATA "
    "nor STATIC_DATA_END; it is due at the end",
    "late policies": "libxenguest takes policies behind STATIC_DATA_END and drops them in silence",
    "optional in checkpoint": "libxenguest refuses an unknown optional record that waits for a checkpoint; "
    "it is to be ignored",
    "verify mismatch": "libxenguest only logs pages that differ behind VERIFY; the restore succeeds",
}
