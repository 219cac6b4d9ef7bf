"""Builds plans for ONNX Runtime: graphs with function bodies made of its own operators.

The weights stay as they are, those of products in int8 aside, which are stored as the fastest product takes them.
"""

import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

from vqdeploy.engines.bodies_onnxrt import CACHED, block_product, swap_in
from vqdeploy.engines.builder import Built, BuiltStage, Options, read_graph, refuse_plugin
from vqdeploy.runtime import bundle
from vqdeploy.runtime.manifest import WEIGHTS, StageInfo

_FEW_ROWS = 2  # up to which MatMulNBits is the faster product in 8 bits on every CPU
# Inputs with a scale. With 128, MatMulNBits adds up one row in another order than several on CPUs with AVX512-VNNI.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 64

Weights: TypeAlias = dict[str, np.ndarray]


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
        models = {stage.name: read_graph(package / stage.file) for stage in stages}
        # A plan holds a matrix once: where one stage multiplies it by few rows, all do it in the same way.
        few = set[str]().union(*(_of_few_rows(models[stage.name].graph, stage) for stage in stages))
        weights, tables = bundle.tensors(np.memmap(package / WEIGHTS, mode="r").data), Weights()
        built = []
        for stage in stages:
            progress(stage.name)
            model = models[stage.name]
            if not (options.portable or cuda):
                _use_byte_products(model.graph, few, weights, tables)
                swap_in(model, _cache_heads(model.graph))
            built.append(BuiltStage(folder / stage.file, _refer_by_name(model.graph)))
            onnx.save(model, folder / stage.file)
        if tables:
            used = {name for stage in built for name in stage.weights}
            save_file({name: array for name, array in (weights | tables).items() if name in used}, folder / WEIGHTS)
        own = folder / WEIGHTS if tables else None
        return Built(f"onnx {version('onnx')}", ("cuda",) if cuda else (), built, own)


def _of_few_rows(graph: onnx.GraphProto, stage: StageInfo) -> set[str]:
    """Names of the matrices in int8 that are usually multiplied by few rows."""
    usual = {name: size.usual for name, size in stage.dims.items()}
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.input, *graph.value_info)}
    found = set()
    for node in graph.node:
        if node.op_type == "QuantizedLinear":
            x, weight, _ = node.input
            rows = math.prod(usual.get(dim.dim_param, dim.dim_value) for dim in shapes.get(x, ())[:-1])
            if x in shapes and 0 < rows <= _FEW_ROWS:
                found.add(weight)
    return found


def _use_byte_products(graph: onnx.GraphProto, chosen: set[str], weights: Weights, tables: Weights) -> None:
    """Replaces products in int8 with these matrices by MatMulNBits, and adds what it reads to `tables`.

    In one node it quantizes activations to 8 bits by blocks of a row, multiplies and scales.
    """
    initializers = {initializer.name: initializer for initializer in graph.initializer}
    replaced: set[str] = set()
    for node in graph.node:
        if node.op_type != "QuantizedLinear" or node.input[1] not in chosen:
            continue
        x, *old = node.input
        if [len(initializers[name].dims) for name in old if name in initializers] != [2, 1]:
            continue  # of a package that was not exported here
        weight, scale = (_array(initializers[name], weights) for name in old)
        inputs, outputs = weight.shape
        block = math.gcd(inputs, _LARGEST_BLOCK)
        if block < _SMALLEST_BLOCK:
            continue
        blocks = inputs // block
        by_output = weight.T.astype(np.uint8, order="C") ^ 128  # which stands for zero
        arrays = by_output.reshape(outputs, blocks, block), np.repeat(scale[:, None], blocks, 1)
        kinds = ("weight", "scale")
        new = [f"{name.removesuffix(f'.{k}')}.bytes_{blocks}.{k}" for name, k in zip(old, kinds, strict=True)]
        for source, name, array in zip(old, new, arrays, strict=True):
            initializers[name] = _like(initializers[source], name, array, tables)
        node.CopyFrom(block_product(node, [x, *new], inputs, outputs, 8, block))
        replaced.update(old)
    unused = replaced - {name for node in graph.node for name in node.input}
    del graph.initializer[:]
    graph.initializer.extend(initializer for name, initializer in initializers.items() if name not in unused)


def _array(initializer: onnx.TensorProto, weights: Weights) -> np.ndarray:
    """Only what lies in the file of weights has a name that no other stage gives to something else."""
    return weights[initializer.name] if initializer.external_data else numpy_helper.to_array(initializer)


def _like(source: onnx.TensorProto, name: str, array: np.ndarray, tables: Weights) -> onnx.TensorProto:
    """An initializer in the graph or in the file of weights, wherever the source is."""
    tensor = numpy_helper.from_array(array, name)
    if source.external_data:
        tables[name] = array
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=WEIGHTS)
    return tensor


def _refer_by_name(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Drops where each tensor lies in the file of weights, since a session takes them by name; returns the names."""
    external = [initializer for initializer in graph.initializer if initializer.external_data]
    for initializer in external:
        del initializer.external_data[:]
        initializer.external_data.add(key="location", value=WEIGHTS)
    return tuple(initializer.name for initializer in external)


def _cache_heads(graph: onnx.GraphProto) -> int:
    """Number of heads of the KV caches [B, H, T, D] of a graph; 0 if ONNX Runtime does not support them."""
    keys = {node.input[1] for node in graph.node if node.op_type in CACHED}
    shapes = [value.type.tensor_type.shape for value in (*graph.input, *graph.value_info) if value.name in keys]
    return shapes[0].dim[1].dim_value if shapes and shapes[0].dim[3].dim_value % 8 == 0 else 0
