"""The reader of ONNX files, against the one of protobuf."""

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqdeploy.errors import ArtifactError
from vqdeploy.runtime.onnx_file import read

STAGES = ("encode", "decode", "step")


def same(ours, theirs):
    """Whether a message of ours says what one of protobuf's says, field by field."""
    fields = {field.name: field for field in theirs.DESCRIPTOR.fields}
    present = {field.name for field, _ in theirs.ListFields()}
    assert present <= set(ours)
    for name, value in ours.items():
        expected = getattr(theirs, name)
        if value is None or value == []:
            assert name not in present
        elif fields[name].message_type is None:
            listed = value if isinstance(value, list) else [value]
            wanted = expected if isinstance(value, list) else [expected]
            assert [bytes(v) if isinstance(v, memoryview) else v for v in listed] == list(wanted)
        elif isinstance(value, list):
            for one, other in zip(value, expected, strict=True):
                same(one, other)
        else:
            same(value, expected)


@pytest.mark.parametrize("stage", STAGES)
def test_a_graph_reads_as_protobuf_reads_it(package, stage):
    content = (package / f"{stage}.onnx").read_bytes()
    same(read(content), onnx.load_from_string(content))


def test_numbers_of_every_kind():
    attribute = onnx.AttributeProto(name="a", i=-(2**63), f=0.5, ints=[0, -1, 2**63 - 1], floats=[1.5, -2.0])
    tensor = onnx.TensorProto(
        dims=[0, 2**40], double_data=[0.1], int64_data=[-1], int32_data=[-5, 7], raw_data=b"\0\xff"
    )
    node = onnx.NodeProto(attribute=[attribute, onnx.AttributeProto(name="b", t=tensor)])
    model = onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(node=[node]))
    same(read(model.SerializeToString()), model)


def field(number, wire, content=b""):
    return bytes([number << 3 | wire]) + content


def message(number, content):
    assert len(content) < 128
    return field(number, 2, bytes([len(content)]) + content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (message(7, b"") * 2, "two fields graph"),
        (field(1, 0, b"\1") * 2, "two fields ir_version"),
        (field(15, 0, b"\1"), "unexpected field 15"),
        (message(1, b""), "another type"),
        (field(7, 0, b"\1"), "another type"),
        (field(1, 0, b"\xff" * 10), "does not end"),
        (field(1, 0, b"\xff" * 9 + b"\x7f"), "does not end"),
        (field(1, 0), "does not end"),
        (field(7, 2, b"\x7f"), "exceeds the enclosing message"),
        (field(7, 3), "another type"),
        (message(2, b"\xff"), "utf-8"),
        (message(7, message(1, message(5, field(2, 5, b"\0\0")))), "not an ONNX graph"),
        (b"ORTM" * 10, "not an ONNX graph"),
        (b"\x80" * 100, "does not end"),
    ],
)
def test_what_readers_could_read_in_two_ways_is_refused(content, reason):
    with pytest.raises(ArtifactError, match=reason):
        read(content)


def test_messages_that_lie_deep_in_one_another():
    model = onnx.ModelProto(ir_version=10)
    graph = model.graph
    for _ in range(30):
        graph = graph.node.add().attribute.add().g
    with pytest.raises(ArtifactError, match="too deep"):
        read(model.SerializeToString())


@settings(max_examples=300)
@given(st.data())
def test_any_bytes_are_read_as_protobuf_reads_them_or_refused(data):
    node = onnx.NodeProto(op_type="Add", input=["a", "b"], output=["c"])
    tensor = onnx.TensorProto(name="a", dims=[2], data_type=1, float_data=[1.0, 2.0])
    model = onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(node=[node], initializer=[tensor]))
    content = bytearray(model.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        ours = read(bytes(content))
    except ArtifactError:
        return
    same(ours, onnx.load_from_string(bytes(content)))
