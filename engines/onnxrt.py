"""Builds plans for ONNX Runtime: graphs with function bodies made of its own operators.

The weights stay as they are, those of products in int8 aside, which are stored as the fastest product takes them.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

from vqdeploy.engines.bodies_onnxrt import CACHED, block_product, swap_in
from vqdeploy.engines.builder import Built, BuiltStage, Options, read_graph
from vqdeploy.runtime import bundle
from vqdeploy.runtime.manifest import WEIGHTS, StageInfo

_FEW_ROWS = 2  # up to which MatMulNBits is the faster product in 8 bits; with AVX512-VNNI it is up to four
# Inputs with a scale. With 128, MatMulNBits adds up one row in another order than several on CPUs with AVX512-VNNI.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 64


class OnnxrtBuilder:
    """Builds plans for the CPU, or for CUDA with the portable function bodies of the package."""

    choices: Mapping[str, Collection[str]] = {"device": ("cpu", "cuda")}

    def tunes(self, stages: Sequence[StageInfo], package: Path, options: Options) -> bool:
        """Products in int8 of few rows, of which a larger batch makes many."""
        return not _is_portable(options) and any(_of_few_rows(read_graph(package / each.file), each) for each in stages)

    def build(
        self,
        stages: Sequence[StageInfo],
        package: Path,
        folder: Path,
        options: Options,
        progress: Callable[[str], object],
    ) -> Built:
        """See `Builder`."""
        portable = _is_portable(options)
        models = [read_graph(package / stage.file) for stage in stages]
        # A plan holds a matrix once: where one stage multiplies it by few rows, all do it in the same way.
        few: set[str] = set()
        if not portable:
            few.update(*map(_of_few_rows, models, stages))
        weights = bundle.tensors(np.memmap(package / WEIGHTS, mode="r").data) if few else {}
        tables: dict[str, np.ndarray] = {}
        built = []
        for stage, model in zip(stages, models, strict=True):
            progress(stage.name)
            if not portable:
                _use_byte_products(model.graph, few, weights, tables)
                swap_in(model, _cache_heads(model.graph))
            built.append(BuiltStage(folder / stage.file, tuple(tensor.name for tensor in _stored(model))))
        file = None
        if tables:
            file = folder / WEIGHTS
            used = {name for stage in built for name in stage.weights}
            save_file({name: array for name, array in (weights | tables).items() if name in used}, file)
            _point_to_file(models, file)
        for stage, model in zip(stages, models, strict=True):
            onnx.save(model, folder / stage.file)
        return Built(f"onnx {version('onnx')}", ("cuda",) if options.device == "cuda" else (), built, file)


def _is_portable(options: Options) -> bool:
    return options.portable or options.device == "cuda"


def _of_few_rows(model: onnx.ModelProto, stage: StageInfo) -> set[str]:
    """Names of the matrices in int8 that are usually multiplied by few rows, if MatMulNBits can take them."""
    initializers = {initializer.name: initializer for initializer in model.graph.initializer}
    usual = {name: size.usual for name, size in stage.dims.items()}
    types = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.value_info)}
    found = set()
    for node in model.graph.node:
        if _block(node, initializers):
            x, weight, _ = node.input
            if x in types and types[x].HasField("shape"):
                rows = [usual.get(dim.dim_param, dim.dim_value) for dim in types[x].shape.dim[:-1]]
                if 0 < math.prod(rows) <= _FEW_ROWS:
                    found.add(weight)
    return found


def _use_byte_products(
    graph: onnx.GraphProto, chosen: set[str], weights: Mapping[str, np.ndarray], tables: dict[str, np.ndarray]
) -> None:
    """Replaces products in int8 with these matrices by MatMulNBits, and adds what it reads to `tables`.

    In one node it quantizes activations to 8 bits by blocks of a row, multiplies and scales.
    """
    old = {initializer.name: initializer for initializer in graph.initializer}
    taken = {*weights, *old, *(name for node in graph.node for name in node.output)}
    new: dict[str, onnx.TensorProto] = {}
    replaced: set[str] = set()
    for node in graph.node:
        block = _block(node, old)
        if not block or node.input[1] not in chosen:
            continue
        weight, scale = (old[name] for name in node.input[1:])
        inputs, outputs = weight.dims
        blocks = inputs // block
        names = [f"{source.name}.bytes_{blocks}" for source in (weight, scale)]
        if taken.intersection(names):
            continue
        by_output = _array(weight, weights).T.astype(np.uint8, order="C") ^ 128  # which stands for zero
        new[names[0]] = _like(weight, names[0], by_output.reshape(outputs, blocks, block), tables)
        new[names[1]] = _like(scale, names[1], np.repeat(_array(scale, weights)[:, None], blocks, 1), tables)
        replaced.update(node.input[1:])
        node.CopyFrom(block_product(node, [node.input[0], *names], inputs, outputs, 8, block))
    unused = replaced - {name for node in graph.node for name in node.input}
    del graph.initializer[:]
    graph.initializer.extend(tensor for name, tensor in (old | new).items() if name not in unused)


def _block(node: onnx.NodeProto, initializers: Mapping[str, onnx.TensorProto]) -> int:
    """Inputs with a scale where MatMulNBits computes this product in int8; 0 if it cannot."""
    if node.op_type != "QuantizedLinear" or not _as_exported(node, initializers):
        return 0
    block = math.gcd(initializers[node.input[1]].dims[0], _LARGEST_BLOCK)
    return block if block >= _SMALLEST_BLOCK else 0


def _as_exported(node: onnx.NodeProto, initializers: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a product has a matrix in int8, and a scale for each column: packages may be damaged."""
    constants = [initializers[name] for name in node.input[1:] if name in initializers]
    if len(node.input) != 3 or len(constants) != 2:
        return False
    weight, scale = constants
    types = (weight.data_type, scale.data_type) == (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT)
    return types and len(weight.dims) == 2 and all(weight.dims) and scale.dims == weight.dims[1:]


def _array(source: onnx.TensorProto, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """An initializer, from the file of weights or the graph; other stages may have another of its name in theirs."""
    return weights[source.name] if source.external_data else numpy_helper.to_array(source)


def _like(source: onnx.TensorProto, name: str, array: np.ndarray, tables: dict[str, np.ndarray]) -> onnx.TensorProto:
    """An initializer in the graph or in the file of weights, wherever the source is."""
    if not source.external_data:
        return numpy_helper.from_array(array, name)
    tables[name] = array
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=WEIGHTS)
    return tensor


def _stored(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Initializers that lie in the file of weights."""
    return [tensor for tensor in model.graph.initializer if tensor.external_data]


def _point_to_file(models: Iterable[onnx.ModelProto], file: Path) -> None:
    """Points initializers at a safetensors file: sessions of ours take them by name, others read where they lie."""
    weights, data = bundle.read_weights(file), bundle.data_offset(file)
    for model in models:
        for tensor in _stored(model):
            start, stop = weights[tensor.name].start, weights[tensor.name].stop
            del tensor.external_data[:]
            for key, value in {"location": WEIGHTS, "offset": data + start, "length": stop - start}.items():
                tensor.external_data.add(key=key, value=str(value))


def _cache_heads(graph: onnx.GraphProto) -> int:
    """Number of heads of the KV caches [B, H, T, D] of a graph; 0 if ONNX Runtime does not support them."""
    keys = {node.input[1] for node in graph.node if node.op_type in CACHED}
    shapes = [value.type.tensor_type.shape for value in (*graph.input, *graph.value_info) if value.name in keys]
    return shapes[0].dim[1].dim_value if shapes and shapes[0].dim[3].dim_value % 8 == 0 else 0
