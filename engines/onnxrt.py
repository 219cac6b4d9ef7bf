"""Builds plans for ONNX Runtime: the graphs with bodies of its own operators, and the weights as they are."""

from pathlib import Path

import onnx

from vqdeploy.engines.bodies_onnxrt import swap_in
from vqdeploy.errors import ArtifactError
from vqdeploy.runtime.manifest import StageInfo


def build_stage(stage: StageInfo, package: Path, folder: Path, portable: bool = False) -> Path:
    """Writes the graph of a stage into `folder`, which refers to the weights by name.

    With `portable` the functions keep the bodies of the package.
    """
    try:
        model = onnx.load(package / stage.file, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no stable home
        raise ArtifactError(f"{package / stage.file} is not an ONNX graph ({error})", fix="vqdeploy export") from error
    if not portable:
        swap_in(model, _cache_heads(model.graph))
    target = folder / stage.file
    onnx.save(model, target)
    return target


def _cache_heads(graph: onnx.GraphProto) -> int:
    """Number of heads of the key-value caches [B, H, T, D] of a graph; 0 if ONNX Runtime cannot take them."""
    keys = {node.input[1] for node in graph.node if node.op_type == "CachedAttention"}
    shapes = [value.type.tensor_type.shape for value in (*graph.input, *graph.value_info) if value.name in keys]
    return shapes[0].dim[1].dim_value if shapes and shapes[0].dim[3].dim_value % 8 == 0 else 0
