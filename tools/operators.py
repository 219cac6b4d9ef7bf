"""Writes `runtime/operators.py`: the operators that a graph of a plan may have, from the schemas of ONNX and ONNX Runtime.

`python tools/operators.py` writes the file, `python tools/operators.py --check` fails when it is not what would be written.

Which operators stand in the table, and what an attribute may be, is said here; how many inputs and outputs there are and
which may be left out comes from the schemas. Left out are operators that need not end (Loop, Scan), that have no one
result (random numbers, dropout), that hold what is no tensor (sequences, optionals, strings), and those that nobody
exports.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx.defs
import onnxruntime

OPSETS = (24, 25)
TARGET = Path(__file__).parent.parent / "runtime" / "operators.py"

ELEMENTWISE = """Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast
CastLike Ceil Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity
IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu
Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor"""
REDUCTIONS = """ArgMax ArgMin CumSum LogSoftmax ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
ReduceProd ReduceSum ReduceSumSquare Softmax"""
LAYERS = """Attention AveragePool BatchNormalization Conv ConvInteger ConvTranspose DequantizeLinear DynamicQuantizeLinear
Einsum Gemm GlobalAveragePool GlobalMaxPool GridSample GroupNormalization InstanceNormalization LayerNormalization
LpNormalization LRN MatMul MatMulInteger MaxPool QuantizeLinear Resize RMSNormalization RotaryEmbedding"""
MOVES = """Compress Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten Gather GatherElements GatherND
NonZero OneHot Pad Range Reshape ScatterElements ScatterND Shape Size Slice SpaceToDepth Split Squeeze Tile TensorScatter
TopK Transpose Trilu Unsqueeze"""
CONTROL = "If"
OPERATORS = {
    "": f"{ELEMENTWISE} {REDUCTIONS} {LAYERS} {MOVES} {CONTROL}".split(),
    "com.microsoft": ["GroupQueryAttention", "MatMulNBits", "MultiHeadAttention"],
}

FLAG, AXIS, ANY = (0, 1), (-8, 7), (-(2**63), 2**63 - 1)
DTYPES = (
    1,
    2,
    3,
    6,
    7,
    9,
    10,
    11,
    16,
    21,
    22,
)  # float, uint8, int8, int32, int64, bool, float16, double, bfloat16, (u)int4
INTEGERS: dict[str, tuple[int, ...]] = {
    # Attributes that are not named here are flags.
    "axis": AXIS,
    "axes": AXIS,
    "perm": (0, 7),
    "batch_dims": (0, 7),
    "start": ANY,
    "end": ANY,
    "bits": (2, 8),
    "block_size": (0, 2**16),
    "blocksize": (1, 2**8),
    "dilations": (1, 2**12),
    "group": (1, 2**16),
    "k": (-(2**16), 2**16),
    "K": (1, 2**24),
    "N": (1, 2**24),
    "kernel_shape": (1, 2**12),
    "kv_num_heads": (1, 2**12),
    "left_window_size": (-1, 2**20),
    "right_window_size": (-1, 2**20),
    "local_window_size": (-1, 2**20),
    "num_groups": (1, 2**16),
    "num_heads": (0, 2**12),
    "num_outputs": (1, 2**12),
    "output_padding": (0, 2**12),
    "output_shape": (1, 2**16),
    "p": (1, 2),
    "pads": (0, 2**12),
    "q_num_heads": (1, 2**12),
    "qk_matmul_output_mode": (0, 3),
    "qk_output": (0, 2),
    "rotary_embedding_dim": (0, 2**12),
    "size": (1, 2**12),
    "strides": (1, 2**12),
    "accuracy_level": (0, 4),
    "value_int": ANY,
    "value_ints": ANY,
    "smooth_softmax": (-1, 1),
    "kv_cache_bit_width": (0, 8),
    "causal": (-1, 1),
}
TYPES = ("to", "dtype", "output_dtype", "precision", "softmax_precision", "stash_type")
STRINGS: dict[str, tuple[str, ...]] = {
    "approximate": ("none", "tanh"),
    "auto_pad": ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"),
    "coordinate_transformation_mode": (
        "align_corners",
        "asymmetric",
        "half_pixel",
        "half_pixel_symmetric",
        "pytorch_half_pixel",
    ),
    "direction": ("LEFT", "RIGHT"),
    "keep_aspect_ratio_policy": ("stretch",),
    "nearest_mode": ("ceil", "floor", "round_prefer_ceil", "round_prefer_floor"),
    "padding_mode": ("border", "reflection", "zeros"),
    "reduction": ("add", "max", "min", "mul", "none"),
    "round_mode": ("down", "nearest", "up"),
    "k_quant_type": ("NONE",),
    "v_quant_type": ("NONE",),
}
MODES = {
    "DepthToSpace": ("CRD", "DCR"),
    "GridSample": ("cubic", "linear", "nearest"),
    "Pad": ("constant", "edge", "reflect", "wrap"),
    "Resize": ("cubic", "linear", "nearest"),
    "TensorScatter": ("circular", "linear"),
}
LEFT_OUT = {"sparse_value", "value_string", "value_strings", "training_mode"}
"""Attributes that no graph of ours has."""


def signature(parameters: Any) -> str:
    """Names of inputs or outputs; `?` marks those that may be left out, `*` a last one that may be repeated."""
    marks = {"Single": "", "Optional": "?", "Variadic": "*"}
    return " ".join(str(p.name) + marks[str(p.option).rpartition(".")[2]] for p in parameters)


LITERALS = {f"tensor({name})": name.upper() for name in ("bool", "float", "int32", "int64", "uint8")}


def type_of(parameter: Any) -> str:
    """The type, or the name of the types, of a parameter; ONNX Runtime spells the field in another way."""
    return str(parameter.type_str if hasattr(parameter, "type_str") else parameter.typeStr)


def results(schema: Any) -> str:
    """As `signature`, of the outputs; `=` tells which input, or which type, an output's type is that of."""
    types = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    inputs = {type_of(p): p.name for p in reversed(schema.inputs) if not str(p.option).endswith("Optional")}
    texts = signature(schema.outputs).split()
    for place, output in enumerate(schema.outputs):
        (*_, only) = allowed = types.get(type_of(output), [type_of(output)])
        if type_of(output) in inputs:
            texts[place] += f"={inputs[type_of(output)]}"
        elif len(allowed) == 1:
            texts[place] += f"={LITERALS[only]}"
    return " ".join(texts)


def rule(operator: str, name: str, attribute: Any) -> str:
    """What an attribute may be, as source text."""
    kind = str(attribute.type).rpartition(".")[2]
    if kind in ("INT", "INTS"):
        values = DTYPES if name in TYPES else INTEGERS.get(name, FLAG)
        text = (
            "DTYPES"
            if values is DTYPES
            else "ANY"
            if values is ANY
            else "FLAG"
            if values is FLAG
            else "AXIS"
            if values is AXIS
            else f"Ints({values[0]}, {values[1]})"
        )
    elif kind == "STRING":
        text = "EQUATION" if name == "equation" else f"Strings{MODES[operator] if name == 'mode' else STRINGS[name]!r}"
    else:
        text = {"FLOAT": "FLOAT", "FLOATS": "FLOAT", "GRAPH": "GRAPH", "TENSOR": "TENSOR"}[kind]
    return f"List({text})" if kind in ("INTS", "FLOATS") else text


def entry(operator: str, schemas: list[Any]) -> str:
    """The row of an operator."""
    newest = schemas[-1]
    assert len({(signature(s.inputs), results(s)) for s in schemas}) == 1, operator
    attributes = {name: value for name, value in sorted(newest.attributes.items()) if name not in LEFT_OUT}
    rules = ", ".join(f"{name!r}: {rule(operator, name, value)}" for name, value in attributes.items())
    required = tuple(name for name, value in attributes.items() if value.required)
    return f"{operator!r}: Operator({signature(newest.inputs)!r}, {results(newest)!r}, {{{rules}}}, {required})"


def table() -> str:
    """The source text of `runtime/operators.py`."""
    contrib = {
        (schema.domain, schema.name): schema
        for schema in onnxruntime.capi.onnxruntime_pybind11_state.get_all_operator_schema()
    }
    rows = [entry(name, [onnx.defs.get_schema(name, opset) for opset in OPSETS]) for name in sorted(OPERATORS[""])]
    own = [entry(name, [contrib["com.microsoft", name]]) for name in OPERATORS["com.microsoft"]]
    return f'''"""The operators that a graph of a plan may have. Written by `tools/operators.py`; change that and run it."""

from vqdeploy.runtime.rules import ANY, AXIS, DTYPES, EQUATION, FLAG, FLOAT, GRAPH, TENSOR, Ints, List, Operator, Strings

OPSETS = {{"": {OPSETS}, "com.microsoft": (1,)}}
"""The versions of each domain whose operators these are."""

ONNX = {{{", ".join(rows)}}}

MICROSOFT = {{{", ".join(own)}}}

OPERATORS = {{"": ONNX, "com.microsoft": MICROSOFT}}
"""Domain -> operator -> its rules."""
'''


def formatted(text: str) -> str:
    """As `ruff format` leaves it."""
    command = [str(Path(sys.executable).with_name("ruff")), "format", "--stdin-filename", str(TARGET), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout  # noqa: S603


def main() -> int:
    """Writes the table, or compares it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    text = formatted(table())
    if parser.parse_args().check:
        return int(TARGET.read_text() != text)
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
