"""A xend domain config as xl's JSON, and what of it has no place there.

Sources: Xen 4.4's tools/python/xen/xend (XendConfig.py, server/), and Xen's tools/libs/light/libxl_types.idl.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from migstream.errors import FormatError
from migstream.sexpr.parser import SExpr

__all__ = ["to_xl_config"]

MAX_VCPUS = 8192  # Xen's own limit

Json = dict[str, object]


class _UnplacedError(ValueError):
    """A value has no place in xl's JSON."""


def to_xl_config(config: SExpr, lost: list[str] | None = None) -> Json:
    """Return xl's JSON (libxl_domain_config of libxl_types.idl) for a xend domain config.

    What has no place in it is named in ``lost``, as ``image/hvm/device_model``. What only said how the
    domain ran, such as its id, is not. Raises `FormatError` for what is no domain config.
    """
    if not isinstance(config, list) or not config or config[0] not in ("domain", "vm"):
        raise FormatError("expected xend's config, an S-expression (domain ...)", offset=0, field="config")
    out = _Config([] if lost is None else lost)
    for key, values in _children(config):
        if key == "image":
            _image(out, values)
        elif key == "device":
            for kind, fields in _children(["device", *values]):
                _device(out, kind, fields)
        else:
            out.place(_DOMAIN, "", key, values)
    out.complete()
    return out.json


def _children(expression: list[SExpr]) -> Iterator[tuple[str, list[SExpr]]]:
    """Yield name and values of each element of ``expression``, behind its own name."""
    for child in expression[1:]:
        if isinstance(child, list) and child and isinstance(child[0], str):
            yield child[0], child[1:]


def _atom(values: list[SExpr]) -> str:
    if len(values) != 1 or not isinstance(values[0], str):
        raise _UnplacedError
    return values[0]


def _number(values: list[SExpr]) -> int:
    text = _atom(values)
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise _UnplacedError
    return int(text)


def _kib(values: list[SExpr]) -> int:
    return _number(values) * 1024


def _flag(values: list[SExpr]) -> str:
    return str(_number(values) != 0)  # libxl's defbool: "True" or "False"


def _words(values: list[SExpr]) -> list[str]:
    return _atom(values).split()


def _one_of(names: dict[str, str]) -> Callable[[list[SExpr]], str]:
    def named(values: list[SExpr]) -> str:
        try:
            return names[_atom(values)]
        except KeyError:
            raise _UnplacedError from None

    return named


_action = _one_of(
    {
        "destroy": "destroy",
        "restart": "restart",
        "preserve": "preserve",
        "rename-restart": "restart_rename",
        "coredump-destroy": "coredump_destroy",
        "coredump-restart": "coredump_restart",
    }
)
_tsc_mode = _one_of({"0": "default", "1": "always_emulate", "2": "native", "3": "native_paravirt"})
_timer_mode = _one_of(
    {
        "0": "delay_for_missed_ticks",
        "1": "no_delay_for_missed_ticks",
        "2": "no_missed_ticks_pending",
        "3": "one_missed_tick_pending",
    }
)
_vga = _one_of({"0": "cirrus", "1": "std"})
_nic_type = _one_of({"ioemu": "vif_ioemu", "netfront": "vif", "paravirtualised": "vif"})

Place = tuple[str, Callable[[list[SExpr]], object]] | None

#: By xend's name: the path in xl's JSON and how the value is read; ``None``: nothing to carry over.
_DOMAIN: dict[str, Place] = {
    "name": ("c_info/name", _atom),
    "uuid": ("c_info/uuid", _atom),
    "pool_name": ("c_info/pool_name", _atom),
    "vcpus": ("b_info/max_vcpus", _number),
    "memory": ("b_info/target_memkb", _kib),
    "maxmem": ("b_info/max_memkb", _kib),
    "shadow_memory": ("b_info/shadow_memkb", _kib),
    "bootloader": ("b_info/bootloader", _atom),
    "bootloader_args": ("b_info/bootloader_args", _words),
    "cpu_weight": ("b_info/sched_params/weight", _number),
    "cpu_cap": ("b_info/sched_params/cap", _number),
    "on_poweroff": ("on_poweroff", _action),
    "on_reboot": ("on_reboot", _action),
    "on_crash": ("on_crash", _action),
} | dict.fromkeys(
    (
        "domid",
        "status",
        "state",
        "store_mfn",
        "console_mfn",
        "start_time",
        "cpu_time",
        "up_time",
        "online_vcpus",
    )
)
_VNC: dict[str, Place] = {
    "vnc": ("vnc/enable", _flag),
    "vncunused": ("vnc/findunused", _flag),
    "vnclisten": ("vnc/listen", _atom),
    "vncdisplay": ("vnc/display", _number),
    "vncpasswd": ("vnc/passwd", _atom),
    "sdl": ("sdl/enable", _flag),
    "opengl": ("sdl/opengl", _flag),
    "keymap": ("keymap", _atom),
}


def _below(path: str, places: dict[str, Place]) -> dict[str, Place]:
    return {key: (f"{path}/{place[0]}", place[1]) if place else None for key, place in places.items()}


_IMAGE: dict[str, Place] = {
    "localtime": ("b_info/localtime", _flag),
    "rtc_timeoffset": ("b_info/rtc_timeoffset", _number),
    "nomigrate": ("b_info/disable_migrate", _flag),
    "tsc_mode": ("b_info/tsc_mode", _tsc_mode),
    "videoram": ("b_info/video_memkb", _kib),
    "notes": None,
}
_LINUX: dict[str, Place] = _IMAGE | {
    "kernel": ("b_info/kernel", _atom),
    "ramdisk": ("b_info/ramdisk", _atom),
    "args": ("b_info/cmdline", _atom),
}
_HVM: dict[str, Place] = (
    _IMAGE
    | {
        "acpi": ("b_info/acpi", _flag),
        "apic": ("b_info/apic", _flag),
        "nestedhvm": ("b_info/nested_hvm", _flag),
        "timer_mode": ("b_info/timer_mode", _timer_mode),
        "hap": ("c_info/hap", _flag),
        "oos": ("c_info/oos", _flag),
    }
    | _below(
        "b_info/type.hvm",
        {
            "pae": ("pae", _flag),
            "hpet": ("hpet", _flag),
            "viridian": ("viridian", _flag),
            "vpt_align": ("vpt_align", _flag),
            "boot": ("boot", _atom),
            "serial": ("serial", _atom),
            "soundhw": ("soundhw", _atom),
            "usb": ("usb", _flag),
            "usbdevice": ("usbdevice", _atom),
            "stdvga": ("vga/kind", _vga),
            "xen_platform_pci": ("xen_platform_pci", _flag),
        }
        | _VNC,
    )
)
_BACKEND: dict[str, Place] = {"uuid": None, "devid": None, "backend": None}
_DISK: dict[str, Place] = _BACKEND | {
    "script": ("script", _atom),
    **dict.fromkeys(("uname", "dev", "mode", "bootable", "VDI", "driver")),
}
_NIC: dict[str, Place] = _BACKEND | {
    "mac": ("mac", _atom),
    "bridge": ("bridge", _atom),
    "script": ("script", _atom),
    "ip": ("ip", _atom),
    "model": ("model", _atom),
    "vifname": ("ifname", _atom),
    "type": ("nictype", _nic_type),
}
_DEVICES: dict[str, tuple[str, dict[str, Place]]] = {
    "vbd": ("disks", _DISK),
    "tap": ("disks", _DISK),
    "tap2": ("disks", _DISK),
    "vif": ("nics", _NIC),
    "vfb": ("vfbs", _BACKEND | _VNC | {"type": None, "location": None}),
    "vkbd": ("vkbs", _BACKEND),
}
_FORMATS = dict.fromkeys(("phy", "file", "aio", "sync", "raw"), "raw") | {
    "qcow": "qcow",
    "qcow2": "qcow2",
    "vhd": "vhd",
    "": "empty",
}


class _Config:
    """xl's JSON as it comes about, and what was lost on the way."""

    def __init__(self, lost: list[str]) -> None:
        self.json: Json = {"c_info": {}, "b_info": {}}
        self.lost = lost

    def put(self, path: str, value: object, inside: Json | None = None) -> None:
        *parents, name = path.split("/")
        target = self.json if inside is None else inside
        for parent in parents:
            below = target.setdefault(parent, {})
            assert isinstance(below, dict)
            target = below
        target[name] = value

    def place(
        self,
        places: dict[str, Place],
        where: str,
        key: str,
        values: list[SExpr],
        inside: Json | None = None,
    ) -> None:
        """Put the value of ``key`` where ``places`` says, or note that it is lost; an empty one is none."""
        if not any(values) or (key in places and places[key] is None):
            return
        try:
            path, read = places[key] or ("", _atom)
            self.put(path, read(values), inside)
        except (KeyError, _UnplacedError):
            self.lost.append(f"{where}{key}")

    def complete(self) -> None:
        """Add what libxl takes for granted in a saved domain."""
        build = self.json["b_info"]
        assert isinstance(build, dict)
        vcpus = build.get("max_vcpus")
        if isinstance(vcpus, int) and vcpus <= MAX_VCPUS:
            build["avail_vcpus"] = list(range(vcpus))


def _image(out: _Config, values: list[SExpr]) -> None:
    for kind, fields in _children(["image", *values]):
        if kind not in ("linux", "hvm"):
            out.lost.append(f"image/{kind}")
            continue
        hvm = kind == "hvm"
        out.put("c_info/type", "hvm" if hvm else "pv")
        out.put(f"b_info/type.{'hvm' if hvm else 'pv'}", {})
        if hvm:
            out.put("b_info/device_model_version", "qemu_xen_traditional")  # xend knew no other
        for key, found in _children([kind, *fields]):
            out.place(_HVM if hvm else _LINUX, f"image/{kind}/", key, found)


def _device(out: _Config, kind: str, fields: list[SExpr]) -> None:
    if kind == "console":
        return  # every domain has one
    if kind not in _DEVICES:
        out.lost.append(f"device/{kind}")
        return
    name, places = _DEVICES[kind]
    device: Json = {}
    found = dict(_children([kind, *fields]))
    for key, values in found.items():
        out.place(places, f"device/{kind}/", key, values, device)
    _backend(device, found)
    if name == "disks":
        _disk(device, found)
        if device["format"] == "unknown":
            out.lost.append(f"device/{kind}/uname")
    devices = out.json.setdefault(name, [])
    assert isinstance(devices, list)
    devices.append(device)


def _text(found: dict[str, list[SExpr]], key: str) -> str:
    values: Iterable[SExpr] = found.get(key, [])
    return next((value for value in values if isinstance(value, str)), "")


def _backend(device: Json, found: dict[str, list[SExpr]]) -> None:
    domain = _text(found, "backend")
    if domain and domain != "0":
        by_id = re.fullmatch(r"[0-9]{1,5}", domain)
        device.update({"backend_domid": int(domain)} if by_id else {"backend_domname": domain})


def _disk(device: Json, found: dict[str, list[SExpr]]) -> None:
    """Take a disk apart: ``(uname tap:qcow2:/path) (dev xvda:disk) (mode w)``."""
    kind, _, path = _text(found, "uname").partition(":")
    while kind in ("tap", "tap2", "tapdisk"):
        kind, _, path = path.partition(":")
    virtual, _, medium = _text(found, "dev").removeprefix("ioemu:").partition(":")
    device["vdev"] = virtual
    device["is_cdrom"] = device["removable"] = int(medium == "cdrom")
    device["readwrite"] = int(_text(found, "mode").startswith("w"))
    device["format"] = _FORMATS.get(kind, "unknown")
    if path:
        device["pdev_path"] = f"/dev/{path}" if kind == "phy" and not path.startswith("/") else path
