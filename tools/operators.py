"""Writes `runtime/operators.py`: the operators that a graph of a plan may have, from the schemas of their libraries.

`python tools/operators.py` writes the file; with `--check` it fails when the file is not what would be written.

This file lists the operators and the allowed values of attributes; the number of inputs and outputs, and which of them
are optional, come from the schemas of ONNX and ONNX Runtime. Excluded are operators that may not terminate (Loop,
Scan), are not deterministic (random numbers, dropout), have values that are not tensors (sequences, optionals,
strings), or are never exported.
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
REDUCTIONS = """ArgMax ArgMin CumSum LogSoftmax ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
ReduceMin ReduceProd ReduceSum ReduceSumSquare Softmax"""
LAYERS = """Attention AveragePool BatchNormalization Conv ConvInteger ConvTranspose DequantizeLinear
DynamicQuantizeLinear Einsum GRU Gemm GlobalAveragePool GlobalMaxPool GridSample GroupNormalization
InstanceNormalization LayerNormalization LpNormalization LRN LSTM MatMul MatMulInteger MaxPool QuantizeLinear Resize
RMSNormalization RotaryEmbedding"""
MOVES = """Compress Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten Gather GatherElements
GatherND NonZero OneHot Pad Range Reshape ScatterElements ScatterND Shape Size Slice SpaceToDepth Split Squeeze Tile
TensorScatter TopK Transpose Trilu Unsqueeze"""
CONTROL = "If"
OPERATORS = {
    "": f"{ELEMENTWISE} {REDUCTIONS} {LAYERS} {MOVES} {CONTROL}".split(),
    "com.microsoft": ["GroupQueryAttention", "MatMulNBits", "MultiHeadAttention"],
}

INTEGERS: dict[str, str] = {
    "axis": "AXIS",
    "axes": "AXIS",
    "perm": "Ints(0, 7)",
    "batch_dims": "Ints(0, 7)",
    "start": "ANY",
    "end": "ANY",
    "bits": "Ints(2, 8)",
    "block_size": "Ints(0, 65536)",
    "blocksize": "Ints(1, 256)",
    "dilations": "Ints(1, 4096)",
    "group": "Ints(1, 65536)",
    "hidden_size": "Ints(1, 65536)",
    "k": "Ints(-65536, 65536)",
    "K": "Ints(1, 16777216)",
    "N": "Ints(1, 16777216)",
    "kernel_shape": "Ints(1, 4096)",
    "kv_num_heads": "Ints(1, 4096)",
    "kv_cache_bit_width": "Ints(8, 8)",
    "left_window_size": "Ints(-1, 1048576)",
    "right_window_size": "Ints(-1, 1048576)",
    "local_window_size": "Ints(-1, 1048576)",
    "num_groups": "Ints(1, 65536)",
    "num_heads": "Ints(0, 4096)",
    "num_outputs": "Ints(1, 4096)",
    "output_padding": "Ints(0, 4096)",
    "output_shape": "Ints(1, 65536)",
    "p": "Ints(1, 2)",
    "pads": "Ints(0, 4096)",
    "q_num_heads": "Ints(1, 4096)",
    "qk_matmul_output_mode": "Ints(0, 3)",
    "qk_output": "Ints(0, 2)",
    "rotary_embedding_dim": "Ints(0, 4096)",
    "size": "Ints(1, 4096)",
    "strides": "Ints(1, 4096)",
    "accuracy_level": "Ints(0, 4)",
    "value_int": "ANY",
    "value_ints": "ANY",
    "smooth_softmax": "Ints(-1, 1)",
    "causal": "Ints(-1, 1)",
    **dict.fromkeys(("to", "dtype", "output_dtype", "precision", "softmax_precision", "stash_type"), "DTYPES"),
}
"""Ranges of integer attributes; all others are flags."""
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
    "keep_aspect_ratio_policy": ("stretch",),
    "k_quant_type": ("NONE", "PER_CHANNEL"),
    "v_quant_type": ("NONE", "PER_CHANNEL"),
    "nearest_mode": ("ceil", "floor", "round_prefer_ceil", "round_prefer_floor"),
    "padding_mode": ("border", "reflection", "zeros"),
    "reduction": ("add", "max", "min", "mul", "none"),
    "round_mode": ("down", "nearest", "up"),
}
MODES = {
    "BitShift": ("LEFT", "RIGHT"),
    "DepthToSpace": ("CRD", "DCR"),
    "GRU": ("bidirectional", "forward", "reverse"),
    "LSTM": ("bidirectional", "forward", "reverse"),
    "GridSample": ("cubic", "linear", "nearest"),
    "Pad": ("constant", "edge", "reflect", "wrap"),
    "Resize": ("cubic", "linear", "nearest"),
    "TensorScatter": ("circular", "linear"),
}
INPUTS = {"GroupQueryAttention": 14, "MultiHeadAttention": 8}
"""Number of inputs of an operator that are allowed; further ones are rejected."""
NOT_GIVEN = {"GroupQueryAttention": range(7, 12)}
"""Indices of inputs before the last allowed one that are rejected."""
LEFT_OUT = {
    "sparse_value",
    "value_string",
    "value_strings",
    "training_mode",
    "activations",
    "activation_alpha",
    "activation_beta",
    "clip",
}
"""Attributes that our graphs never have."""


def signature(parameters: Any) -> str:
    """Names of inputs or outputs; `?` marks optional ones, `*` a variadic last one."""
    marks = {"Single": "", "Optional": "?", "Variadic": "*"}
    return " ".join(str(p.name) + marks[str(p.option).rpartition(".")[2]] for p in parameters)


LITERALS = {f"tensor({name})": name.upper() for name in ("bool", "float", "int32", "int64", "uint8")}


def type_of(parameter: Any) -> str:
    """The type, or the type variable, of a parameter; ONNX Runtime names the field differently."""
    return str(parameter.type_str if hasattr(parameter, "type_str") else parameter.typeStr)


def results(schema: Any) -> str:
    """As `signature`, for the outputs; `=` gives the input, or the type, that determines the type of an output."""
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
    """The rule of an attribute, as source text."""
    kind = str(attribute.type).rpartition(".")[2]
    if kind.startswith("INT"):
        text = INTEGERS.get(name, "FLAG")
    elif kind == "STRING":
        text = (
            "EQUATION"
            if name == "equation"
            else f"Strings{MODES[operator] if name in ('mode', 'direction') else STRINGS[name]!r}"
        )
    else:
        text = kind.removesuffix("S")
    return f"List({text})" if kind in ("INTS", "FLOATS") else text


def entry(operator: str, schemas: list[Any]) -> str:
    """The row of an operator."""
    newest = schemas[-1]
    if len({(signature(s.inputs), results(s)) for s in schemas}) > 1:
        raise SystemExit(f"{operator} differs from opset to opset: the table has one row for all")
    attributes = {name: value for name, value in sorted(newest.attributes.items()) if name not in LEFT_OUT}
    rules = ", ".join(f"{name!r}: {rule(operator, name, value)}" for name, value in attributes.items())
    required = tuple(name for name, value in attributes.items() if value.required)
    names = signature(newest.inputs[: INPUTS.get(operator)]).split()
    inputs = " ".join("-?" if place in NOT_GIVEN.get(operator, ()) else name for place, name in enumerate(names))
    return f"{operator!r}: Operator({inputs!r}, {results(newest)!r}, {{{rules}}}, {required})"


WORDS = "ANY, AXIS, DTYPES, EQUATION, FLAG, FLOAT, GRAPH, TENSOR, Ints, List, Operator, Strings"


def table() -> str:
    """The source text of `runtime/operators.py`."""
    contrib = {
        (schema.domain, schema.name): schema
        for schema in onnxruntime.capi.onnxruntime_pybind11_state.get_all_operator_schema()
    }
    rows = [entry(name, [onnx.defs.get_schema(name, opset) for opset in OPSETS]) for name in sorted(OPERATORS[""])]
    own = [entry(name, [contrib["com.microsoft", name]]) for name in OPERATORS["com.microsoft"]]
    return f'''"""The operators that a graph of a plan may have. `tools/operators.py` writes this file."""

from vqdeploy.runtime.rules import {WORDS}

OPSETS = {{"": {OPSETS}, "com.microsoft": (1,)}}
"""Opset versions of each domain that the table is valid for."""

ONNX = {{{", ".join(rows)}}}

MICROSOFT = {{{", ".join(own)}}}

OPERATORS = {{"": ONNX, "com.microsoft": MICROSOFT}}
"""Domain -> operator -> its rules."""
'''


def formatted(text: str) -> str:
    """Formats source text with `ruff format`."""
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
