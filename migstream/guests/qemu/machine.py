"""What a QEMU machine is, and whether it can be migrated: asked over QMP before anything is done to it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from migstream.errors import GuestError
from migstream.guests.qemu.client import QmpClient, QmpCommandError
from migstream.guests.qemu.ram_file import flags_for
from migstream.guests.qemu.ram_map import Area, RamMap, parse_flat_view, parse_ram_map
from migstream.records.libxc import Hypervisor, Origin

__all__ = ["Machine", "check_blockers", "check_same", "look_at", "run_state"]

_ADDRESS = re.compile(r"\((.+)\) is 0x([0-9a-f]+)")
_GLOBAL = re.compile(r"^([a-z-]+): (on|off)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Machine:
    """A QEMU machine. ``address`` is where its RAM starts in QEMU's process, ``region`` what QEMU calls it.

    ``section_footer`` and ``send_configuration`` are the properties of QEMU's migration that say which form
    its device state has.
    """

    version: str
    package: str
    machine: str
    cpu: str
    accelerator: str
    vcpus: int
    ram: RamMap
    region: str
    address: int
    section_footer: bool
    send_configuration: bool
    areas: tuple[Area, ...]

    @property
    def origin(self) -> Origin:
        """The record that names this machine in a stream."""
        properties = {
            "version": self.version,
            "package": self.package,
            "machine": self.machine,
            "cpu": self.cpu,
            "accelerator": self.accelerator,
            "section-footer": "on" if self.section_footer else "off",
        }
        return Origin(
            hypervisor=Hypervisor.QEMU,
            vcpus=self.vcpus,
            ram_size=self.ram.size,
            ram_below_4g=self.ram.below,
            ram_above_base=self.ram.above_base,
            data=Origin.pack(properties.items()),
        )


def look_at(qmp: QmpClient) -> Machine:
    """Return what the machine is. Raises `GuestError`, with the flags that help."""
    version = qmp.query("query-version")
    numbers = version.get("qemu")
    assert isinstance(numbers, dict)
    size = _ram_size(qmp)
    region, address = _start_of_ram(qmp)
    areas = parse_flat_view(qmp.monitor("info mtree -f"))
    vcpus = qmp.execute("query-cpus-fast")
    if not isinstance(vcpus, list) or not vcpus:
        raise GuestError("QEMU's machine has no processor")
    settings = _migration_settings(qmp)
    return Machine(
        version=".".join(str(numbers.get(part, "?")) for part in ("major", "minor", "micro")),
        package=str(version.get("package", "")),
        machine=str(qmp.property("/machine", "type")).removesuffix("-machine"),
        cpu=str(qmp.property(str(vcpus[0]["qom-path"]), "type")),
        accelerator="kvm" if qmp.query("query-kvm").get("enabled") else "tcg",
        vcpus=len(vcpus),
        ram=parse_ram_map(areas, region, size),
        region=region,
        address=address,
        section_footer=settings.get("send-section-footer", True),
        send_configuration=settings.get("send-configuration", True),
        areas=tuple(areas),
    )


def run_state(qmp: QmpClient) -> str:
    """Return QEMU's run state: ``running``, ``paused``, ``inmigrate`` and so on (QAPI's RunState)."""
    return str(qmp.query("query-status").get("status"))


def check_blockers(qmp: QmpClient) -> None:
    """Raise `GuestError` where a device forbids migration."""
    reasons = qmp.query("query-migrate").get("blocked-reasons")
    if isinstance(reasons, list) and reasons:
        raise GuestError(
            f"QEMU's machine cannot be migrated: {'; '.join(map(str, reasons))}; start it without that device"
        )


def check_same(found: Machine, wanted: Origin) -> None:
    """Raise `GuestError` where the machine is not of the shape that an image was made of."""
    if wanted.hypervisor != Hypervisor.QEMU:
        raise GuestError(
            f"the image was made of no QEMU machine (hypervisor {wanted.hypervisor}), so QEMU cannot run it"
        )
    properties = wanted.properties
    saved_ram = RamMap(wanted.ram_size, wanted.ram_below_4g, wanted.ram_above_base)
    footer = "on" if found.section_footer else "off"
    comparisons = (
        ("memory of", found.ram, saved_ram, flags_for(saved_ram.size)),
        ("the machine type", found.machine, properties.get("machine", "?"), "-machine {}"),
        ("processors numbering", found.vcpus, wanted.vcpus, "-smp {}"),
        ("processors of the type", found.cpu, properties.get("cpu", found.cpu), "the same -cpu"),
        (
            "migration.send-section-footer",
            footer,
            properties.get("section-footer", footer),
            "-global migration.send-section-footer={}",
        ),
    )
    for what, here, there, remedy in comparisons:
        if here != there:
            raise GuestError(
                f"this QEMU machine has {what} {here}, the saved one had {there}: start this one with "
                f"{remedy.format(there)}"
            )


def _ram_size(qmp: QmpClient) -> int:
    """Return the size of the one backend that is the machine's RAM, in octets; raises `GuestError`."""
    summary = qmp.query("query-memory-size-summary")
    size = summary.get("base-memory")
    assert isinstance(size, int)
    if summary.get("plugged-memory"):
        raise GuestError("QEMU's machine has hot-plugged memory, which cannot be carried: give all by -m")
    backend = str(qmp.property("/machine", "memory-backend") or "")
    if not backend:
        raise GuestError(
            "QEMU's machine has no memory backend of its own (-machine memory-backend=); start it with "
            f"{flags_for(size)}, without memdev= for NUMA nodes"
        )
    if not qmp.property(backend, "share"):
        raise GuestError(
            f"QEMU's RAM, the backend {backend.rpartition('/')[2]!r}, is not shared, so no other process can "
            f"see it; start QEMU with {flags_for(size)}"
        )
    return size


def _start_of_ram(qmp: QmpClient) -> tuple[str, int]:
    """Return the memory region at guest-physical address 0, and where QEMU's process has it."""
    text = qmp.monitor("gpa2hva 0")
    match = _ADDRESS.search(text)
    if match is None:
        raise GuestError(f"QEMU does not tell where guest memory begins: {text.strip()}")
    return match[1], int(match[2], 16)


def _migration_settings(qmp: QmpClient) -> dict[str, bool]:
    """Return the properties of QEMU's migration object; newer versions list them only when asked for all."""
    found: dict[str, bool] = {}
    for line in ("info migrate", "info migrate -a"):
        try:
            found = {name: value == "on" for name, value in _GLOBAL.findall(qmp.monitor(line))}
        except QmpCommandError:
            continue
        if "send-configuration" in found:
            break
    return found
