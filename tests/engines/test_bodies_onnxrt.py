"""The one function of a plan that may loop."""

import onnx
import pytest

from vqdeploy.engines import bodies_onnxrt
from vqdeploy.errors import ArtifactError
from vqdeploy.runtime import graphs, onnx_file


def model(*functions: onnx.FunctionProto) -> onnx.ModelProto:
    """A graph that calls the first function."""
    inputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("a", "b", "c")]
    codes = onnx.helper.make_tensor_value_info("codes", onnx.TensorProto.INT64, None)
    node = onnx.helper.make_node(functions[0].name, ["a", "b", "c"], ["codes"], domain="vqdeploy")
    imports = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("vqdeploy", 1)]
    graph = onnx.helper.make_graph([node], "graph", inputs, [codes])
    return onnx.helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)


@pytest.fixture
def search():
    return onnx.parser.parse_function(bodies_onnxrt._SEARCH_BY_ROWS)


def test_the_search_is_known_by_its_content(search):
    data = model(search).SerializeToString()
    assert graphs.digest(onnx_file.read(data)["functions"][0]) == graphs.LOOP
    graphs.check(data, {})


@pytest.mark.parametrize("change", ["name", "bound", "body"])
def test_a_loop_that_is_another_one_is_refused(search, change):
    if change == "name":
        search.name = "VQNearest"
    elif change == "bound":
        (most,) = [node for node in search.node if list(node.output) == ["most_trips"]]
        most.attribute[0].ints[0] = 2**62
    else:
        (loop,) = [node for node in search.node if node.op_type == "Loop"]
        loop.attribute[0].g.node[0].op_type = "Not"
    with pytest.raises(ArtifactError, match="the graph is refused"):
        graphs.check(model(search).SerializeToString(), {})
