"""S-expressions: what xend, libvirt and xapi print is read back, and a xend config becomes xl's JSON."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from migstream.errors import FormatError
from migstream.sexpr import MAX_DEPTH, MAX_SIZE, Dialect, SExpr, parse, to_xl_config

# Small printers, as the three programs print


def xend_atom(text: str) -> str:
    """Print an atom as Python 2's repr of its octets does, which xend uses for all but plain words."""
    if text.isascii() and text.replace("-", "").replace("/", "").isalnum():
        return text
    quote = '"' if "'" in text and '"' not in text else "'"
    named = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", quote: "\\" + quote}
    octets = text.encode("utf-8", "surrogateescape")
    return (
        quote + "".join(named.get(chr(o), chr(o) if 32 <= o < 127 else f"\\x{o:02x}") for o in octets) + quote
    )


def ocaml_atom(text: str) -> str:
    """Print an atom as Sexplib does: decimal escapes."""
    if text.isascii() and text.isalnum():
        return text
    octets = text.encode("utf-8", "surrogateescape")
    named = {'"': '\\"', "\\": "\\\\", "\n": "\\n"}
    return '"' + "".join(named.get(chr(o), chr(o) if 32 <= o < 127 else f"\\{o:03}") for o in octets) + '"'


def libvirt_atom(text: str) -> str:
    """Print an atom as libvirt does: in quotes where it has blanks or parentheses, and never escaped."""
    return f"'{text}'" if not text or set(text) & set(" ()\t\n\"'\\") or not text.isprintable() else text


def printed(expression: SExpr, dialect: Dialect) -> str:
    if isinstance(expression, str):
        return {"xend": xend_atom, "ocaml": ocaml_atom, "libvirt": libvirt_atom}[dialect](expression)
    return f"({' '.join(printed(item, dialect) for item in expression)})"


DIALECTS: tuple[Dialect, ...] = ("xend", "ocaml", "libvirt")
any_text = st.binary(max_size=12).map(lambda octets: octets.decode("utf-8", "surrogateescape"))
unquoted_text = st.text(st.characters(exclude_characters="'\0", exclude_categories=["Cs"]), max_size=12)


def expressions(atoms: st.SearchStrategy[str]) -> st.SearchStrategy[SExpr]:
    return st.recursive(atoms, lambda inner: st.lists(inner, max_size=5), max_leaves=20)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), dialect=st.sampled_from(DIALECTS))
def test_what_is_printed_is_read_back(data: st.DataObject, dialect: Dialect) -> None:
    expression = data.draw(expressions(unquoted_text if dialect == "libvirt" else any_text))
    text = printed(expression, dialect)
    assert parse(text, dialect) == expression
    assert parse(text.encode("utf-8", "surrogateescape") + b"\0", dialect) == expression


@settings(max_examples=200, deadline=None)
@given(octets=st.binary(max_size=60) | st.text("()'\"\\x0#; a\n", max_size=60).map(str.encode))
def test_any_octets_are_an_expression_or_an_error_with_its_place(octets: bytes) -> None:
    for dialect in DIALECTS:
        error = refusal(octets, dialect)
        assert error is None or 0 <= (error.offset or 0) <= len(octets)


def refusal(text: str | bytes, dialect: Dialect) -> FormatError | None:
    try:
        parse(text, dialect)
    except FormatError as exc:
        return exc
    return None


@pytest.mark.parametrize(
    ("text", "dialect", "expected"),
    [
        ("(name 'it\\'s')", "xend", ["name", "it's"]),
        ('(name "it\'s \\"x\\"")', "xend", ["name", "it's \"x\""]),
        (r"(a '\a\b\t\n\v\f\r\\\101\x41\xc3\xa9\377')", "xend", ["a", "\a\b\t\n\v\f\r\\AA\u00e9\udcff"]),
        ("(a ; b)", "xend", ["a", ";", "b"]),
        ("(a # b)\n c)", "xend", ["a", "c"]),
        ("(path /dev/mapper/vg-lv:1)", "xend", ["path", "/dev/mapper/vg-lv:1"]),
        (r"(name 'back\slash\')", "libvirt", ["name", "back\\slash\\"]),
        ('(name say"it"#1)', "libvirt", ["name", 'say"it"#1']),
        (r'((time "20140101T00:00:00Z")(vm_str "\"a\"\065\n"))', "ocaml",
         [["time", "20140101T00:00:00Z"], ["vm_str", '"a"A\n']]),
        ("() ; the end", "ocaml", []),
        ("alone", "xend", "alone"),
        ("''", "xend", ""),
    ],
)  # fmt: skip
def test_golden_texts(text: str, dialect: Dialect, expected: SExpr) -> None:
    assert parse(text, dialect) == expected


@pytest.mark.parametrize(
    ("text", "offset", "message"),
    [
        ("", 0, "there is nothing"),
        ("(a (b)", 6, "1 lists are open"),
        ("(a))", 3, "more behind it"),
        (")", 0, "closed that was not opened"),
        ("(a) b", 4, "more behind it"),
        ("(a 'b", 3, "not closed"),
        ("(a 'b\\'", 3, "not closed"),
        ("(\u00e9 'b)", 4, "not closed"),
    ],
)
def test_what_is_no_expression_is_refused_with_its_place(text: str, offset: int, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        parse(text)
    assert caught.value.offset == offset


def test_nesting_and_size_are_bounded() -> None:
    assert parse("(" * MAX_DEPTH + ")" * MAX_DEPTH) != []
    with pytest.raises(FormatError, match="nested more than 64 deep") as caught:
        parse("(" * 1_000_000)
    assert caught.value.offset == MAX_DEPTH
    with pytest.raises(FormatError, match="the limit is"):
        parse("a" * (MAX_SIZE + 1))


@pytest.mark.parametrize(
    "hostile", ["'" + "\\" * 400_001, '"' * 300_001, "(" + "a#\n" * 200_000, "\\" * 400_000]
)
def test_a_hostile_text_takes_time_in_proportion_to_its_length(hostile: str) -> None:
    for dialect in DIALECTS:
        refusal(hostile, dialect)


# A xend config as xl's JSON


PV = """
(domain (domid 7) (cpu_weight 512) (cpu_cap 50) (name web1) (uuid 4b3e5a0c-2d3e-5f1a-8a0b-1c2d3e4f5a6b)
  (bootloader /usr/bin/pygrub) (bootloader_args '-q --entry 2') (vcpus 3) (memory 96) (maxmem 128)
  (on_poweroff destroy) (on_reboot restart) (on_crash rename-restart) (features ) (on_xend_start ignore)
  (image (linux (kernel /boot/vmlinuz) (ramdisk /boot/initrd) (args 'root=/dev/xvda1 ro') (tsc_mode 2)
                (notes (FEATURES '!writable') (VIRT_BASE 18446744071562067968)) (superpages 0)))
  (status 2) (state r-----) (store_mfn 1234) (console_mfn 1235) (start_time 1300000000.5)
  (device (vbd (uname phy:vg/web1) (dev xvda1) (mode w) (backend 0) (uuid 1-2) (bootable 1) (VDI '')))
  (device (tap2 (uname tap2:tapdisk:aio:/srv/a:b.img) (dev xvdb:disk) (mode r) (backend storage)))
  (device (vif (bridge xenbr0) (mac 00:16:3e:11:22:33) (script vif-bridge) (rate 10Mb/s) (backend 4)))
  (device (vfb (vncunused 1) (type vnc) (vnclisten 0.0.0.0) (keymap de) (display :0)))
  (device (vkbd (backend 0)))
  (device (console (protocol vt100) (location 2)))
  (device (pci (dev (domain 0x0) (bus 0x1)))))
"""


def test_a_pv_config_of_xend_becomes_xls() -> None:
    lost: list[str] = []
    assert to_xl_config(parse(PV), lost) == {
        "c_info": {"type": "pv", "name": "web1", "uuid": "4b3e5a0c-2d3e-5f1a-8a0b-1c2d3e4f5a6b"},
        "b_info": {
            "max_vcpus": 3,
            "avail_vcpus": [0, 1, 2],
            "max_memkb": 131072,
            "target_memkb": 98304,
            "sched_params": {"weight": 512, "cap": 50},
            "bootloader": "/usr/bin/pygrub",
            "bootloader_args": ["-q", "--entry", "2"],
            "kernel": "/boot/vmlinuz",
            "ramdisk": "/boot/initrd",
            "cmdline": "root=/dev/xvda1 ro",
            "tsc_mode": "native",
            "type.pv": {},
        },
        "on_poweroff": "destroy",
        "on_reboot": "restart",
        "on_crash": "restart_rename",
        "disks": [
            {"vdev": "xvda1", "pdev_path": "/dev/vg/web1", "format": "raw", "readwrite": 1, "removable": 0,
             "is_cdrom": 0},
            {"vdev": "xvdb", "pdev_path": "/srv/a:b.img", "format": "raw", "readwrite": 0, "removable": 0,
             "is_cdrom": 0, "backend_domname": "storage"},
        ],
        "nics": [
            {"bridge": "xenbr0", "mac": "00:16:3e:11:22:33", "script": "vif-bridge", "backend_domid": 4}
        ],
        "vfbs": [{"vnc": {"findunused": "True", "listen": "0.0.0.0"}, "keymap": "de"}],
        "vkbs": [{}],
    }  # fmt: skip
    assert lost == [
        "on_xend_start",
        "image/linux/superpages",
        "device/vif/rate",
        "device/vfb/display",
        "device/pci",
    ]


def test_an_hvm_config_of_xend_becomes_xls() -> None:
    text = (
        "(domain (name hvm1) (vcpus 1) (image (hvm (kernel '') (loader /usr/lib/xen/boot/hvmloader) (acpi 1)"
        " (apic 0) (pae 1) (boot dc) (hap 1) (timer_mode 1) (vnc 1) (vnclisten 127.0.0.1) (stdvga 1)"
        " (usbdevice tablet) (localtime 0) (videoram 8)))"
        " (device (vbd (uname file:/srv/x.iso) (dev ioemu:hdc:cdrom) (mode r)))"
        " (device (vbd (uname '') (dev hdd:cdrom) (mode r)))"
        " (device (vbd (uname drbd:r0) (dev hda:disk) (mode w)))"
        " (device (vif (type ioemu) (model e1000) (mac 00:16:3e:00:00:01))))"
    )
    lost: list[str] = []
    config = to_xl_config(parse(text), lost)
    assert config["c_info"] == {"type": "hvm", "name": "hvm1", "hap": "True"}
    assert config["b_info"] == {
        "max_vcpus": 1,
        "avail_vcpus": [0],
        "device_model_version": "qemu_xen_traditional",
        "acpi": "True",
        "apic": "False",
        "timer_mode": "no_delay_for_missed_ticks",
        "localtime": "False",
        "video_memkb": 8192,
        "type.hvm": {
            "pae": "True",
            "boot": "dc",
            "vnc": {"enable": "True", "listen": "127.0.0.1"},
            "vga": {"kind": "std"},
            "usbdevice": "tablet",
        },
    }
    disks = config["disks"]
    assert isinstance(disks, list)
    assert [(disk["vdev"], disk["is_cdrom"], disk["format"]) for disk in disks] == [
        ("hdc", 1, "raw"),
        ("hdd", 1, "empty"),
        ("hda", 0, "unknown"),
    ]
    assert config["nics"] == [{"nictype": "vif_ioemu", "model": "e1000", "mac": "00:16:3e:00:00:01"}]
    assert lost == ["image/hvm/loader", "device/vbd/uname"]


@pytest.mark.parametrize(
    ("field", "lost"),
    [
        ("(vcpus many)", "vcpus"),
        ("(vcpus 1 2)", "vcpus"),
        ("(memory 99999999999999999999)", "memory"),
        ("(on_crash explode)", "on_crash"),
        ("(name (a b))", "name"),
        ("(image (stub (x 1)))", "image/stub"),
        ("(device (vif (mac (1 2))))", "device/vif/mac"),
    ],
)
def test_a_value_that_makes_no_sense_is_lost_and_named(field: str, lost: str) -> None:
    found: list[str] = []
    to_xl_config(parse(f"(domain {field})"), found)
    assert found == [lost]


def test_a_huge_number_of_vcpus_makes_no_list_of_them() -> None:
    config = to_xl_config(parse("(domain (vcpus 999999999))"))
    assert config["b_info"] == {"max_vcpus": 999_999_999}


@pytest.mark.parametrize("text", ["domain", "()", "((domain))", "(network (name x))"])
def test_what_is_no_domain_config_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="expected xend's config"):
        to_xl_config(parse(text))


WORDS = [
    "domain",
    "image",
    "hvm",
    "linux",
    "device",
    "vbd",
    "vif",
    "vfb",
    "vcpus",
    "uname",
    "backend",
    "-1",
    "2",
]


@settings(max_examples=150, deadline=None)
@given(expression=expressions(st.sampled_from(WORDS)))
def test_any_expression_makes_a_config_that_is_json(expression: SExpr) -> None:
    made = to_xl_config(["domain", expression, ["image", expression], ["device", expression]], [])
    assert json.loads(json.dumps(made)) == made
