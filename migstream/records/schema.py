"""How a record is declared, and what follows from one declaration.

A declaration is a class whose fields say their wire type, their meaning and their unit; type checkers
see it as a frozen dataclass with keyword-only fields (PEP 681), which is how it behaves::

    class X86TscInfo(LibxcRecord, code=0x08, type="X86_TSC_INFO"):
        mode: int = u32("TSC mode", names=TscMode)
        khz: int = u32("TSC frequency", unit="kHz")

From it come `parse` and `build` in both byte orders, the JSON form, the tables in ``spec/``, the
reserved-bits rule of verify and the `struct` format that the reader's hot path uses. There is no
second list of fields anywhere.

Every format of this package is a fixed head of integers and octets, then at most one variable part:
an array, counted by a field of the head or filling the body, or octets to the end. `struct` and
numpy's dtypes say all of that, so nothing heavier is imported (``spec/architecture.md`` has the
measurement behind that choice).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast, dataclass_transform

from migstream.errors import FormatError
from migstream.records.array import Array, array_of
from migstream.records.fields import (
    COUNTED,
    INT_CHAR,
    MISSING,
    ORDER_CHAR,
    ByteOrder,
    Octets,
    WireField,
    array,
    octets,
    reserved,
    u8,
    u16,
    u32,
    u64,
)

__all__ = ["REGISTRY", "Declaration", "OpaqueRecord", "Record"]

_SURPLUS = WireField("octets", 0, "octets past the declared fields", default=b"")
_SURPLUS.name = "surplus"


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(u8, u16, u32, u64, reserved, octets, array)
)
class Declaration:
    """Base of everything declared: headers, records and the entries of arrays. Keyword-only, frozen.

    ``surplus`` holds octets that a body carries past what is declared, so that nothing is lost.
    """

    surplus = b""

    wire_fields: ClassVar[tuple[WireField, ...]] = ()
    head_size: ClassVar[int] = 0
    #: What follows the declared fields and is never decoded (the pages of PAGE_DATA), or empty.
    payload: ClassVar[str] = ""

    _head: ClassVar[tuple[WireField, ...]]
    _head_names: ClassVar[tuple[str, ...]]
    _tail: ClassVar[WireField | None]
    _structs: ClassVar[dict[ByteOrder, struct.Struct]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _compile(cls)

    # Generated classes (`dataclasses`) would cost a millisecond each at every start of the program, of
    # which there are forty; one `__init__` for all costs nothing.
    if not TYPE_CHECKING:

        def __init__(self, **values):
            known = {wire.name for wire in self.wire_fields}
            if not values.keys() <= known:
                unknown = ", ".join(sorted(values.keys() - known))
                raise TypeError(f"{type(self).__name__} has no field {unknown}")
            for wire in self.wire_fields:
                value = values.get(wire.name, wire.default)
                if value is MISSING:
                    raise TypeError(f"{type(self).__name__} needs the field {wire.name}")
                self.__dict__[wire.name] = value
            self._check()

        def __setattr__(self, name, value):
            raise AttributeError(f"{type(self).__name__} is frozen")

        __delattr__ = __setattr__

    def __repr__(self) -> str:
        shown = [f"{wire.name}={getattr(self, wire.name)!r}" for wire in self.wire_fields]
        shown += [f"surplus={self.surplus!r}"] if self.surplus else []
        return f"{type(self).__name__}({', '.join(shown)})"

    def _check(self) -> None:
        """Fill in counts from what they count; refuse what could not be built."""
        for wire in self._head:
            value = self.__dict__[wire.name]
            if wire.counts:
                actual = len(getattr(self, wire.counts))
                if value not in (COUNTED, actual):
                    raise ValueError(
                        f"{type(self).__name__}.{wire.name} is not the length of {wire.counts}, {actual}"
                    )
                self.__dict__[wire.name] = actual
            elif wire.kind == "octets" and len(value) != wire.size:
                raise ValueError(f"{type(self).__name__}.{wire.name} has to be {wire.size} octets long")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        names = [wire.name for wire in self.wire_fields]
        return all(getattr(self, name) == getattr(other, name) for name in [*names, "surplus"])

    def __hash__(self) -> int:
        return hash((type(self), self.build("little")))

    @classmethod
    def struct(cls, order: ByteOrder) -> struct.Struct:
        """Return the fixed head as a compiled `struct.Struct`, for hot paths."""
        return cls._structs[order]

    @classmethod
    def offset_of(cls, name: str) -> int:
        """Return where the field ``name`` starts, in octets; raises `ValueError` for no such field."""
        names = [wire.name for wire in cls.wire_fields]
        return sum(wire.size for wire in cls.wire_fields[: names.index(name)])

    @classmethod
    def parse(cls, buf: Octets, order: ByteOrder = "little") -> Self:
        """Decode ``buf``; its octets are referred to, not copied, by arrays.

        Raises `FormatError`, with the offset within ``buf`` and the field, when it is too short.
        """
        if len(buf) < cls.head_size:
            raise _too_short(cls, len(buf))
        values: dict[str, Any] = dict(zip(cls._head_names, cls._structs[order].unpack_from(buf), strict=True))
        wire = cls._tail
        # Nothing behind the head, as in most records: spare the view.
        rest = memoryview(buf)[cls.head_size :] if wire is not None or len(buf) > cls.head_size else b""
        if wire is not None:
            length = _tail_length(cls, wire, values, len(rest))
            content = rest[:length]
            values[wire.name] = (
                Array(wire.entry or wire.size, content, order) if wire.kind == "array" else bytes(content)
            )
            rest = rest[length:]
        if rest and not cls.payload:
            values["surplus"] = bytes(rest)
        made = cls.__new__(cls)  # what was parsed fits: nothing to check or to fill in
        made.__dict__.update(values)
        return made

    def build(self, order: ByteOrder = "little") -> bytes:
        """Encode in ``order``; raises `ValueError` for an integer that does not fit its field."""
        values = [getattr(self, w.name) for w in self._head]
        try:
            head = self._structs[order].pack(*values)
        except struct.error as exc:
            raise ValueError(f"{type(self).__name__}: {exc}") from None
        if self._tail is None:
            return head + self.surplus
        tail = getattr(self, self._tail.name)
        return head + (tail.in_order(order) if isinstance(tail, Array) else tail) + self.surplus

    def reserved_fields(self) -> Iterator[tuple[WireField, int | bytes]]:
        """Yield each reserved field that is not zero, with its value."""
        for wire in self._head:
            if wire.reserved:
                value = getattr(self, wire.name)
                if any(value) if isinstance(value, bytes) else value:
                    yield wire, value

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: integers, octets as hex, arrays as lists, ``x_name`` beside a named ``x``."""
        out: dict[str, Any] = {}
        for wire in self.wire_fields:
            value = getattr(self, wire.name)
            if isinstance(value, Array):
                out[wire.name] = [item.to_json() if wire.entry else item for item in value]
            elif isinstance(value, bytes):
                out[wire.name] = value.hex()
            else:
                out[wire.name] = value
                if wire.names is not None:
                    out[f"{wire.name}_name"] = wire.label(value) or None
        if self.surplus:
            out["surplus"] = self.surplus.hex()
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Make one from its JSON form; raises `ValueError` for a field that is missing or malformed."""
        if not isinstance(data, dict):
            raise ValueError(f"{cls.__name__}: expected an object, found {data!r}")
        values: dict[str, Any] = {}
        for wire in cls.wire_fields:
            if wire.name not in data:
                raise ValueError(f"{cls.__name__}: the field {wire.name} is missing")
            values[wire.name] = _value_from_json(cls, wire, data[wire.name])
        made = cls(**values)
        surplus = _value_from_json(cls, _SURPLUS, data.get("surplus", ""))
        if surplus:
            made.__dict__["surplus"] = surplus
        return made


def _compile(cls: type[Declaration]) -> None:
    """Derive the wire form of ``cls`` from the fields that it declares, behind those it inherits."""
    declared = [(name, wire) for name, wire in vars(cls).items() if isinstance(wire, WireField)]
    for name, wire in declared:
        wire.name = name
        delattr(cls, name)
    wires = cls.wire_fields + tuple(wire for _, wire in declared)
    variable = [w for w in wires if w.variable]
    if variable and variable != [wires[-1]]:
        raise TypeError(f"{cls.__name__}: only the last field may be of variable length")
    head = wires[:-1] if variable else wires
    codes = "".join(INT_CHAR[w.size] if w.kind == "int" else f"{w.size}s" for w in head)
    cls.wire_fields = wires
    cls._head = head
    cls._head_names = tuple(w.name for w in head)
    cls._tail = wires[-1] if variable else None
    cls._structs = {order: struct.Struct(char + codes) for order, char in ORDER_CHAR.items()}
    cls.head_size = cls._structs["little"].size


def _value_from_json(cls: type[Declaration], wire: WireField, value: Any) -> Any:
    try:
        if wire.kind == "octets":
            return bytes.fromhex(value)
        if wire.kind == "int":
            struct.pack(ORDER_CHAR["little"] + INT_CHAR[wire.size], value)  # refuses what does not fit
            return value
        if wire.entry:
            return array_of(wire.entry, [wire.entry.from_json(item) for item in value])
        return array_of(wire.size, value)
    except (TypeError, ValueError, struct.error) as exc:
        raise ValueError(f"{cls.__name__}.{wire.name}: {exc}") from None


def _tail_length(cls: type[Declaration], wire: WireField, values: dict[str, Any], available: int) -> int:
    unit = wire.size if wire.kind == "array" else 1
    if not wire.counted_by:
        return available // unit * unit
    count: int = values[wire.counted_by]
    if count * unit > available:
        raise FormatError(
            f"{wire.counted_by} is {count}, which needs {count * unit} octets of {wire.name}; "
            f"the body has {available} left",
            offset=cls.offset_of(wire.counted_by),
            field=wire.counted_by,
        )
    return count * unit


def _too_short(cls: type[Declaration], length: int) -> FormatError:
    end = 0
    for wire in cls._head:
        end += wire.size
        if end > length:
            break
    return FormatError(
        f"{cls.__name__} needs at least {cls.head_size} octets, the body has {length}",
        offset=length,
        field=wire.name,
    )


#: Every declared record: layer -> type code -> class.
REGISTRY: dict[str, dict[int, type[Record]]] = {}


class Record(Declaration):
    """Base of the records of a layer; a subclass with a ``code`` enters the `REGISTRY`."""

    layer: ClassVar[str] = ""
    code: ClassVar[int] = -1
    #: The type's name in the specification, such as ``PAGE_DATA``.
    type: ClassVar[str] = ""

    def __init_subclass__(cls, *, layer: str = "", code: int = -1, type: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if layer:
            cls.layer = layer
        if code >= 0:
            cls.code, cls.type = code, type
            REGISTRY.setdefault(cls.layer, {})[code] = cls

    @property
    def type_code(self) -> int:
        """The type code that goes into the record header."""
        return self.code


class OpaqueRecord(Record):
    """A record of a type that is not known here: its code and its body, kept as they are."""

    body: bytes = octets("the body")

    @classmethod
    def of(cls, layer: str, type_code: int, body: bytes) -> Self:
        """Make one of ``layer``'s type ``type_code``."""
        made = cls(body=body)
        made.__dict__.update(_type_code=type_code, layer=layer)
        return made

    @property
    def type_code(self) -> int:
        """The type code that goes into the record header."""
        return cast(int, getattr(self, "_type_code", -1))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: the body as hex, and what no declaration says, layer and type code."""
        return {"layer": self.layer, "type_code": self.type_code, **super().to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Make one from its JSON form; raises `ValueError` for a field that is missing or malformed."""
        made = super().from_json(data)
        layer, code = data.get("layer"), data.get("type_code")
        bits = 64 if layer == "xapi" else 32
        if layer not in REGISTRY or not isinstance(code, int) or not 0 <= code < 1 << bits:
            raise ValueError(f"{cls.__name__}: layer {layer!r} or type_code {code!r} is not one")
        return cls.of(layer, code, made.body)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OpaqueRecord) and (self.layer, self.type_code, self.body) == (
            other.layer,
            other.type_code,
            other.body,
        )

    __hash__ = Record.__hash__
