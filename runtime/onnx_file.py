"""A strict parser of ONNX files, for untrusted input; it does not need `onnx`.

Protobuf parsers are lenient: they skip unknown fields, merge a repeated message, and take the last of two scalars. A
check is only sound if the engine parses the same graph that was checked. So every ambiguity is an error.
"""

import struct
from typing import Any

from vqdeploy.errors import ArtifactError

Message = dict[str, Any]
"""A parsed message: a repeated field is a list, a missing field is None."""

_DEPTH = 32  # nesting of messages: the graph of a branch is three levels below its node
_FIELDS = 2_000_000

# Messages and fields as in `onnx.proto`; `*` marks repeated fields. Not supported, since we write none: training,
# sparse tensors, sequences, device names, string tensors.
_SCHEMA = """
Model: 1 ir_version int, 2 producer_name text, 3 producer_version text, 4 domain text, 5 model_version int,
    6 doc_string text, 7 graph Graph, 8 opset_import Opset*, 14 metadata_props Entry*, 25 functions Function*
Opset: 1 domain text, 2 version int
Entry: 1 key text, 2 value text
Graph: 1 node Node*, 2 name text, 5 initializer Tensor*, 10 doc_string text, 11 input Value*, 12 output Value*,
    13 value_info Value*, 16 metadata_props Entry*
Node: 1 input text*, 2 output text*, 3 name text, 4 op_type text, 5 attribute Attribute*, 6 doc_string text,
    7 domain text, 8 overload text, 9 metadata_props Entry*
Attribute: 1 name text, 2 f float, 3 i int, 4 s bytes, 5 t Tensor, 6 g Graph, 7 floats float*, 8 ints int*,
    9 strings bytes*, 13 doc_string text, 20 type int, 21 ref_attr_name text
Tensor: 1 dims int*, 2 data_type int, 4 float_data float*, 5 int32_data int*, 7 int64_data int*, 8 name text,
    9 raw_data bytes, 10 double_data double*, 12 doc_string text, 13 external_data Entry*, 14 data_location int,
    16 metadata_props Entry*
Value: 1 name text, 2 type Type, 3 doc_string text, 4 metadata_props Entry*
Type: 1 tensor_type TensorType
TensorType: 1 elem_type int, 2 shape Shape
Shape: 1 dim Dim*
Dim: 1 dim_value int, 2 dim_param text
Function: 1 name text, 4 input text*, 5 output text*, 6 attribute text*, 7 node Node*, 8 doc_string text,
    9 opset_import Opset*, 10 domain text, 11 attribute_proto Attribute*, 12 value_info Value*, 13 overload text,
    14 metadata_props Entry*
"""


def _schema() -> dict[str, dict[int, tuple[str, str, bool]]]:
    messages = {}
    for line in _SCHEMA.strip().replace("\n    ", " ").splitlines():
        message, _, text = line.partition(": ")
        parts = [part.split() for part in text.split(", ")]
        messages[message] = {int(number): (name, kind.rstrip("*"), kind.endswith("*")) for number, name, kind in parts}
    return messages


_MESSAGES = _schema()
_EMPTY: dict[str, Message] = {
    message: {name: [] if repeated else None for name, _, repeated in fields.values()}
    for message, fields in _MESSAGES.items()
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRES = {"int": _VARINT, "float": _FIXED32, "double": _FIXED64}


def read(data: bytes | memoryview) -> Message:
    """The model in an ONNX file, as nested dictionaries.

    Raises:
        ArtifactError: The bytes are malformed, or parsers could read them differently.
    """
    try:
        return _Reader(memoryview(data)).message("Model", 0, len(data), 0)
    except (ValueError, IndexError, struct.error) as error:
        raise ArtifactError(f"the bytes are not an ONNX graph ({error})") from error


class _Reader:
    def __init__(self, data: memoryview):
        self._data, self._fields = data, 0

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        """A varint of at most 64 bits, and its end."""
        value = shift = 0
        while at < stop:
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64:
                    break
                return value, at
            shift += 7
            if shift > 63:
                break
        raise ValueError(f"a number at byte {at} does not end")

    def message(self, kind: str, at: int, stop: int, depth: int) -> Message:
        if depth > _DEPTH:
            raise ValueError("messages are nested too deeply")
        known, seen = _MESSAGES[kind], set()
        values: Message = {name: [] if empty is not None else None for name, empty in _EMPTY[kind].items()}
        while at < stop:
            self._fields += 1
            if self._fields > _FIELDS:
                raise ValueError("there are too many fields")
            tag, at = self._varint(at, stop)
            number, wire = tag >> 3, tag & 7
            if number not in known:
                raise ValueError(f"{kind} has an unexpected field {number} at byte {at}")
            name, what, repeated = known[number]
            if not repeated and number in seen:
                raise ValueError(f"{kind} has two fields {name}")
            seen.add(number)
            end = at
            if wire == _BYTES:
                size, at = self._varint(at, stop)
                end = at + size
                if end > stop:
                    raise ValueError(f"a field at byte {at} exceeds the enclosing message")
            if wire == _BYTES and repeated and what in _WIRES:
                values[name] += self._packed(what, at, end)
                at = end
                continue
            if wire != _WIRES.get(what, _BYTES):
                raise ValueError(f"{kind}.{name} is of another type")
            if wire == _BYTES:
                value = self._value(what, at, end, depth)
                at = end
            else:
                value, at = self._number(what, at, stop)
            if repeated:
                values[name].append(value)
            else:
                values[name] = value
        return values

    def _value(self, kind: str, at: int, end: int, depth: int) -> object:
        if kind == "bytes":
            return self._data[at:end]
        if kind == "text":
            return str(self._data[at:end], "utf-8")
        return self.message(kind, at, end, depth + 1)

    def _number(self, kind: str, at: int, stop: int) -> tuple[Any, int]:
        if kind == "int":
            value, at = self._varint(at, stop)
            return value - (1 << 64) if value >> 63 else value, at
        size, form = (4, "<f") if kind == "float" else (8, "<d")
        return struct.unpack_from(form, self._data[:stop], at)[0], at + size

    def _packed(self, kind: str, at: int, end: int) -> list[Any]:
        values = []
        while at < end:
            value, at = self._number(kind, at, end)
            values.append(value)
        self._fields += len(values)
        return values
