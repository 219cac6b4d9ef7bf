"""Builds plans for ONNX Runtime: graphs with function bodies made of its own operators, and the weights as they are."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import onnx

from vqdeploy.engines.bodies_onnxrt import CACHED, swap_in
from vqdeploy.engines.builder import Built, BuiltStage, Options, read_graph, refuse_plugin
from vqdeploy.runtime.manifest import StageInfo


class OnnxrtBuilder:
    """Builds plans for the CPU, or for CUDA with the portable function bodies of the package."""

    def build(
        self,
        stages: Sequence[StageInfo],
        package: Path,
        folder: Path,
        options: Options,
        progress: Callable[[str], object],
    ) -> Built:
        """See `Builder`."""
        if options.plugin == "on":
            raise refuse_plugin("onnxrt has no ahead-of-time compiled plugins")
        cuda = options.device == "cuda"
        built = []
        for stage in stages:
            progress(stage.name)
            built.append(_build_stage(stage, package, folder, portable=options.portable or cuda))
        return Built(f"onnx {version('onnx')}", ("cuda",) if cuda else (), built)


def _build_stage(stage: StageInfo, package: Path, folder: Path, portable: bool) -> BuiltStage:
    """Writes the graph of a stage, which refers to the weights by name."""
    model = read_graph(package / stage.file)
    if not portable:
        swap_in(model, _cache_heads(model.graph))
    target = folder / stage.file
    onnx.save(model, target)
    return BuiltStage(target, stage.weights)


def _cache_heads(graph: onnx.GraphProto) -> int:
    """Number of heads of the KV caches [B, H, T, D] of a graph; 0 if ONNX Runtime does not support them."""
    keys = {node.input[1] for node in graph.node if node.op_type in CACHED}
    shapes = [value.type.tensor_type.shape for value in (*graph.input, *graph.value_info) if value.name in keys]
    return shapes[0].dim[1].dim_value if shapes and shapes[0].dim[3].dim_value % 8 == 0 else 0
