"""ONNX functions of the operators in `vqdeploy.models.ops`, and how PyTorch's exporter keeps each as one node.

A node of domain `vqdeploy` comes with its function, so that any runtime can inline it. The attributes
`plugin_namespace` and `plugin_version` let a TensorRT plugin of the same name replace the node. TensorRT looks
functions up by name alone: the names must differ from those of every ONNX operator.
"""

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir
import torch
from onnx.defs import OpSchema
from onnxscript import values

import vqdeploy.models.ops  # noqa: F401  (registers torch.ops.vqdeploy)

Translation = Callable[..., Any]
"""(Inputs and attributes of a node) -> values for its results."""

DOMAIN = "vqdeploy"
OPSET = 24
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_INT64 = "tensor(int64)"

_SHARED_ROWS = """
    rows = Gather <axis = 0> (codebook, safe)"""
_OWN_ROWS = """
    one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    minus_one = Constant <value_ints = [-1]> ()
    width = Shape <start = 2, end = 3> (codebook)
    flat_shape = Concat <axis = 0> (minus_one, width)
    flat = Reshape (codebook, flat_shape)
    count_shape = Shape <start = 1, end = 2> (codes)
    count = Squeeze (count_shape, first)
    numbers = Range (zero, count, one)
    size = Shape <start = 1, end = 2> (codebook)
    starts = Mul (numbers, size)
    places = Add (safe, starts)
    rows = Gather <axis = 0> (flat, places)"""


def _lookup(shared: bool) -> str:
    """`VQLookup`, with one shared codebook or one per depth."""
    return f"""
VQLookup (codes, codebook) => (vectors)
{{
    zero = Constant <value_int = 0> ()
    last = Constant <value_ints = [-1]> ()
    depths = Constant <value_ints = [1]> ()
    safe = Max (codes, zero)
    {_SHARED_ROWS if shared else _OWN_ROWS}
    used = GreaterOrEqual (codes, zero)
    used_float = CastLike (used, codebook)
    used_column = Unsqueeze (used_float, last)
    masked = Mul (rows, used_column)
    vectors = ReduceSum <keepdims = 0> (masked, depths)
}}"""


def _cached_attention(head: str, stored: str, keys: str, values: str) -> str:
    """Causal attention to the `keys` and `values` of what `stored` writes into the caches."""
    # A mask of -30000 is finite in fp16 too: a fully masked row must not become NaN.
    return f"""
{head} => (attention, present_key, present_value)
{{
    zeros = Constant <value_ints = [0, 0]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    three = Constant <value_ints = [3]> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    trailing = Constant <value_ints = [1, 2, 3]> ()
    flat = Constant <value_ints = [0, 0, -1]> ()
    floor = Constant <value = float {{-30000.0}}> ()

    heads = Shape <start = 1, end = 2> (past_key)
    dim = Shape <start = 3, end = 4> (past_key)
    split_shape = Concat <axis = 0> (zeros, three, heads, dim)
    split = Reshape (qkv, split_shape)
    by_head = Transpose <perm = [2, 0, 3, 1, 4]> (split)
    query_1, key_1, value_1 = Split <axis = 0, num_outputs = 3> (by_head)
    query = Squeeze (query_1, first)
    key = Squeeze (key_1, first)
    value = Squeeze (value_1, first){stored}

    places_shape = Shape <start = 2, end = 3> (past_key)
    places_count = Squeeze (places_shape, first)
    places = Range (zero, places_count, one)
    length_shape = Shape <start = 1, end = 2> (qkv)
    length = Squeeze (length_shape, first)
    offsets = Range (zero, length, one)
    offsets_column = Unsqueeze (offsets, second)
    start = Unsqueeze (position, trailing)
    own_place = Add (start, offsets_column)
    hidden = Less (own_place, places)
    floor_like = CastLike (floor, qkv)

    keys_transposed = Transpose <perm = [0, 1, 3, 2]> ({keys})
    scores = MatMul (query, keys_transposed)
    seen = Where (hidden, floor_like, scores)
    weights = Softmax <axis = -1> (seen)
    heads_out = MatMul (weights, {values})
    merged = Transpose <perm = [0, 2, 1, 3]> (heads_out)
    attention = Reshape (merged, flat)
}}"""


_CACHED_ATTENTION = _cached_attention(
    "CachedAttention (qkv, past_key, past_value, position)",
    """
    present_key = TensorScatter <axis = -2, mode = "linear"> (past_key, key, position)
    present_value = TensorScatter <axis = -2, mode = "linear"> (past_value, value, position)""",
    "present_key",
    "present_value",
)

_QUANTIZED_CACHED_ATTENTION = _cached_attention(
    "QuantizedCachedAttention (qkv, past_key, past_value, position, key_scale, value_scale)",
    """
    unit = Constant <value = float {1.0}> ()
    middle = Constant <value = int8 {0}> ()"""
    + "".join(
        f"""
    {name}_units = Div ({name}, {name}_scale)
    {name}_integers = QuantizeLinear ({name}_units, unit, middle)
    present_{name} = TensorScatter <axis = -2, mode = "linear"> (past_{name}, {name}_integers, position)
    {name}_floats = Cast <to = 1> (present_{name})
    {name}s = Mul ({name}_floats, {name}_scale)"""
        for name in ("key", "value")
    ),
    "keys",
    "values",
)


_WRITE_CACHE = """
WriteCache (past, entries, position) => (present)
{
    present = TensorScatter <axis = -2, mode = "linear"> (past, entries, position)
}"""


def _packed_attention(heads: int) -> str:
    return f"""
PackedAttention (qkv) => (attention)
{{
    first = Constant <value_ints = [0]> ()
    split_shape = Constant <value_ints = [0, 0, 3, {heads}, -1]> ()
    flat = Constant <value_ints = [0, 0, -1]> ()
    split = Reshape (qkv, split_shape)
    by_head = Transpose <perm = [2, 0, 3, 1, 4]> (split)
    query_1, key_1, value_1 = Split <axis = 0, num_outputs = 3> (by_head)
    query = Squeeze (query_1, first)
    key = Squeeze (key_1, first)
    value = Squeeze (value_1, first)
    keys_transposed = Transpose <perm = [0, 1, 3, 2]> (key)
    scores = MatMul (query, keys_transposed)
    weights = Softmax <axis = -1> (scores)
    heads_out = MatMul (weights, value)
    merged = Transpose <perm = [0, 2, 1, 3]> (heads_out)
    attention = Reshape (merged, flat)
}}"""


def _scaled_attention(heads: int) -> str:
    return f"""
ScaledAttention (query, key, value) => (attention)
{{
    split_shape = Constant <value_ints = [0, 0, {heads}, -1]> ()
    flat = Constant <value_ints = [0, 0, -1]> ()
    query_split = Reshape (query, split_shape)
    key_split = Reshape (key, split_shape)
    value_split = Reshape (value, split_shape)
    queries = Transpose <perm = [0, 2, 1, 3]> (query_split)
    keys_transposed = Transpose <perm = [0, 2, 3, 1]> (key_split)
    values = Transpose <perm = [0, 2, 1, 3]> (value_split)
    scores = MatMul (queries, keys_transposed)
    weights = Softmax <axis = -1> (scores)
    heads_out = MatMul (weights, values)
    merged = Transpose <perm = [0, 2, 1, 3]> (heads_out)
    attention = Reshape (merged, flat)
}}"""


_SCORES = {
    "l2": """
    transposed = Transpose <perm = [1, 0]> (table)
    squares = Mul (table, table)
    norms = ReduceSum <keepdims = 0> (squares, axis)
    two = Constant <value = float {2.0}> ()
    half_scores = MatMul (vectors, transposed)
    products = Mul (half_scores, two)
    scores = Sub (products, norms)""",
    "cosine": """
    lengths = ReduceL2 <keepdims = 1> (table, axis)
    smallest = Constant <value = float {1e-12}> ()
    divisors = Max (lengths, smallest)
    directions = Div (table, divisors)
    transposed = Transpose <perm = [1, 0]> (directions)
    scores = MatMul (vectors, transposed)""",
    "dot": """
    transposed = Transpose <perm = [1, 0]> (table)
    scores = MatMul (vectors, transposed)""",
}
"""Scores, the higher the nearer; the norm of the vector does not change the order of angles."""


def _nearest(metric: str) -> str:
    """`VQNearest`; an ONNX function cannot branch on an attribute. Its body is an fp32 island."""
    return f"""
VQNearest (z, codebook) => (codes)
{{
    axis = Constant <value_ints = [1]> ()
    table = Cast <to = 1> (codebook)
    vectors = Cast <to = 1> (z)
    {_SCORES[metric]}
    codes = ArgMax <axis = 1, keepdims = 0> (scores)
}}"""


def _residual(depth: int, metric: str, shared: bool) -> str:
    """`VQResidual` unrolled: an ONNX function cannot loop over an attribute. Its body is an fp32 island."""
    book = "" if shared else "_{d}"
    steps = "\n".join(
        _RESIDUAL_STEP[metric].format(d=d, e=d + 1, book=book.format(d=d), table=f"table{book.format(d=d)}")
        for d in range(depth)
    )
    books = _SHARED_BOOK if shared else _split_books(depth)
    tables = "\n".join(
        _BOOK[metric].format(book=name) for name in ([""] if shared else [f"_{d}" for d in range(depth)])
    )
    columns = ", ".join(f"column_{d}" for d in range(depth))
    vectors = ", ".join(f"vector_{d}" for d in range(depth))
    return f"""
VQResidual (z, codebook) => (codes, quantized)
{{
    axis = Constant <value_ints = [1]> ()
    two = Constant <value = float {{2.0}}> ()
    residual_0 = Cast <to = 1> (z)
{books}
{tables}
{steps}
    codes = Concat <axis = 1> ({columns})
    total = Sum ({vectors})
    quantized = CastLike (total, z)
}}"""


_SHARED_BOOK = "    table = Cast <to = 1> (codebook)"


def _split_books(depth: int) -> str:
    """Splits the codebooks [Q, K, D]."""
    parts = ", ".join(f"part_{d}" for d in range(depth))
    apart = "\n".join(f"    table_{d} = Squeeze (part_{d}, first)" for d in range(depth))
    return f"""
    first = Constant <value_ints = [0]> ()
    tables = Cast <to = 1> (codebook)
    {parts} = Split <axis = 0, num_outputs = {depth}> (tables)
{apart}"""


_BOOK = {
    "l2": """
    squares{book} = Mul (table{book}, table{book})
    norms{book} = ReduceSum <keepdims = 0> (squares{book}, axis)
    transposed{book} = Transpose <perm = [1, 0]> (table{book})
    directions{book} = Mul (transposed{book}, two)""",
    "cosine": """
    smallest{book} = Constant <value = float {{1e-12}}> ()
    lengths{book} = ReduceL2 <keepdims = 1> (table{book}, axis)
    divisors{book} = Max (lengths{book}, smallest{book})
    units{book} = Div (table{book}, divisors{book})
    directions{book} = Transpose <perm = [1, 0]> (units{book})""",
    "dot": """
    directions{book} = Transpose <perm = [1, 0]> (table{book})""",
}

_CHOICE = """
    code_{d} = ArgMax <axis = -1, keepdims = 0> (score_{d})
    column_{d} = Unsqueeze (code_{d}, axis)
    vector_{d} = Gather <axis = 0> ({table}, code_{d})
    residual_{e} = Sub (residual_{d}, vector_{d})"""

_PRODUCT = """
    score_{d} = MatMul (residual_{d}, directions{book})"""

_RESIDUAL_STEP = {
    "l2": """
    product_{d} = MatMul (residual_{d}, directions{book})
    score_{d} = Sub (product_{d}, norms{book})"""
    + _CHOICE,
    "cosine": _PRODUCT + _CHOICE,
    "dot": _PRODUCT + _CHOICE,
}


def _search(name: str, start: str, measure: str, target: str) -> str:
    """Searches the largest threshold above `start` whose survivors weigh `target`: 3 rounds of 64 candidates."""
    rounds = [f"    {name}_width_0 = Sub (top, {start})\n    {name}_low_0 = Identity ({start})"]
    rounds += [
        f"""
    {name}_step_{r} = Mul ({name}_width_{r}, fractions)
    {name}_grid_{r} = Add ({name}_low_{r}, {name}_step_{r})
    {name}_column_{r} = Unsqueeze ({name}_grid_{r}, last)
    {name}_reached_{r} = GreaterOrEqual (candidates, {name}_column_{r})
    {name}_float_{r} = Cast <to = 1> ({name}_reached_{r})
    {name}_weighed_{r} = Mul ({name}_float_{r}, {measure})
    {name}_sum_{r} = ReduceSum <keepdims = 0> ({name}_weighed_{r}, last)
    {name}_enough_{r} = GreaterOrEqual ({name}_sum_{r}, {target})
    {name}_passing_{r} = Where ({name}_enough_{r}, {name}_grid_{r}, {start})
    {name}_low_{r + 1} = ReduceMax <keepdims = 1> ({name}_passing_{r}, axis)
    {name}_width_{r + 1} = Div ({name}_width_{r}, ways)"""
        for r in range(3)
    ]
    return "\n".join(rounds)


# TensorRT sorts at most 3,840 values, so both thresholds are found by search. After three rounds the interval is 2^-18
# of the range of the logits, far below the distance of neighbouring logits.
_TRUNCATION = f"""
    axis = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    one = Constant <value = float {{1.0}}> ()
    ways = Constant <value = float {{64.0}}> ()
    removed = Constant <value = float {{-1e30}}> ()
    fractions = Constant <value_floats = [{", ".join(str(i / 64) for i in range(64))}]> ()

    logits_fp32 = Cast <to = 1> (logits)
    divisor = Unsqueeze (temperature, axis)
    scaled = Div (logits_fp32, divisor)
    candidates = Unsqueeze (scaled, axis)
    top = ReduceMax <keepdims = 1> (scaled, axis)
    bottom = ReduceMin <keepdims = 1> (scaled, axis)
    top_k_float = Cast <to = 1> (top_k)
    count = Unsqueeze (top_k_float, axis)
{_search("k", "bottom", "one", "count")}
    below_k = Less (scaled, k_low_3)
    survivors = Where (below_k, removed, scaled)
    probabilities = Softmax <axis = 1> (survivors)
    weights = Unsqueeze (probabilities, axis)
    mass = Unsqueeze (top_p, axis)
{_search("p", "k_low_3", "weights", "mass")}
    nucleus = Less (mass, one)
    threshold_p = Where (nucleus, p_low_3, k_low_3)
    below_p = Less (scaled, threshold_p)
    kept = Where (below_p, removed, scaled)"""

_TRUNCATED_LOGITS = f"""
TruncatedLogits (logits, temperature, top_k, top_p) => (kept)
{{{_TRUNCATION}
}}"""

_GUMBEL_SAMPLE = f"""
GumbelSample (logits, noise, temperature, top_k, top_p) => (codes)
{{{_TRUNCATION}
    perturbed = Add (kept, noise)
    codes = ArgMax <axis = 1, keepdims = 0> (perturbed)
}}"""


_QUANTIZED_LINEAR = """
QuantizedLinear (x, weight, scale) => (y)
{
    table = DequantizeLinear <axis = 1> (weight, scale)
    like_x = CastLike (table, x)
    y = MatMul (x, like_x)
}"""


# Two weights a byte, as in `MatMulNBits` of ONNX Runtime. ONNX's own type of 4 bits has no bytes in safetensors, and
# DequantizeLinear of it no kernel where this has.
_BLOCK_QUANTIZED_LINEAR = """
BlockQuantizedLinear (x, weight, scale) => (y)
{
    lower_half = Constant <value = uint8 {15}> ()
    half = Constant <value = uint8 {4}> ()
    zero = Constant <value = float {8.0}> ()
    last = Constant <value_ints = [-1]> ()
    by_block = Constant <value_ints = [0, 0, -1]> ()
    first = BitwiseAnd (weight, lower_half)
    second = BitShift <direction = "RIGHT"> (weight, half)
    first_column = Unsqueeze (first, last)
    second_column = Unsqueeze (second, last)
    pairs = Concat <axis = -1> (first_column, second_column)
    integers = Reshape (pairs, by_block)
    floats = Cast <to = 1> (integers)
    centred = Sub (floats, zero)
    scale_column = Unsqueeze (scale, last)
    blocks = Mul (centred, scale_column)
    rows = Flatten <axis = 1> (blocks)
    table = Transpose <perm = [1, 0]> (rows)
    like_x = CastLike (table, x)
    y = MatMul (x, like_x)
}"""


def _quantized_row_convolution(taps: int) -> str:
    return f"""
QuantizedRowConvolution (x, weight, scale) => (y)
{{
    by_tap = Constant <value_ints = [0, {taps}, -1]> ()
    table = DequantizeLinear <axis = 1> (weight, scale)
    like_x = CastLike (table, x)
    columns = Transpose <perm = [1, 0]> (like_x)
    taps = Reshape (columns, by_tap)
    kernel = Transpose <perm = [0, 2, 1]> (taps)
    channels = Transpose <perm = [0, 2, 1]> (x)
    rows = Conv <pads = [{taps // 2}, {taps // 2}]> (channels, kernel)
    y = Transpose <perm = [0, 2, 1]> (rows)
}}"""


def _quantized_convolution(padding: int) -> str:
    """A convolution between QuantizeLinear and DequantizeLinear, which runtimes merge into one of integers."""
    return f"""
QuantizedConvolution (x, weight, scale, bias, step, zero, output_step, output_zero) => (y)
{{
    integers = QuantizeLinear (x, step, zero)
    maps = DequantizeLinear (integers, step, zero)
    kernel = DequantizeLinear <axis = 0> (weight, scale)
    units = Mul (scale, step)
    shifts = DequantizeLinear <axis = 0> (bias, units)
    sums = Conv <pads = [{padding}, {padding}, {padding}, {padding}]> (maps, kernel, shifts)
    output_integers = QuantizeLinear (sums, output_step, output_zero)
    y = DequantizeLinear (output_integers, output_step, output_zero)
}}"""


def parse(text: str, imports: dict[str, int] | None = None) -> onnx.FunctionProto:
    """Parses a function of domain `vqdeploy` from ONNX text syntax."""
    opsets = ", ".join(f'"{domain}" : {version}' for domain, version in ({"": OPSET} | (imports or {})).items())
    return onnx.parser.parse_function(f'<opset_import: [{opsets}], domain: "{DOMAIN}">{text}')


_FUNCTIONS: dict[str, Callable[..., str]] = {
    "VQNearest": _nearest,
    "VQResidual": _residual,
    "VQLookup": _lookup,
    "PackedAttention": _packed_attention,
    "ScaledAttention": _scaled_attention,
    "CachedAttention": lambda: _CACHED_ATTENTION,
    "QuantizedCachedAttention": lambda: _QUANTIZED_CACHED_ATTENTION,
    "WriteCache": lambda: _WRITE_CACHE,
    "QuantizedLinear": lambda: _QUANTIZED_LINEAR,
    "BlockQuantizedLinear": lambda: _BLOCK_QUANTIZED_LINEAR,
    "QuantizedRowConvolution": _quantized_row_convolution,
    "QuantizedConvolution": _quantized_convolution,
    "GumbelSample": lambda: _GUMBEL_SAMPLE,
    "TruncatedLogits": lambda: _TRUNCATED_LOGITS,
}


def function(name: str, **attributes: Any) -> onnx.FunctionProto:
    """The portable function of an operator, for the values of the attributes that its body depends on."""
    return parse(_FUNCTIONS[name](**attributes))


_VARYING = ("metric", "depth", "heads", "padding", "taps")
"""Attributes that an ONNX function cannot branch on, so that each value needs a body of its own."""


def _node(name: str, inputs: list[tuple[str, str]], outputs: list[tuple[str, str]], **attributes: type) -> Translation:
    """The translation of a PyTorch operator to one node, whose function is added later and not inlined."""
    kinds = {"plugin_namespace": DOMAIN, "plugin_version": "1"}
    required = [OpSchema.Attribute(key, OpSchema.AttrType.STRING) for key in kinds]
    types = {int: OpSchema.AttrType.INT, str: OpSchema.AttrType.STRING}
    required += [OpSchema.Attribute(key, types[kind]) for key, kind in attributes.items()]
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(*parameter) for parameter in inputs],
        outputs=[OpSchema.FormalParameter(*parameter) for parameter in outputs],
        type_constraints=[("T", _FLOATS, ""), ("C", _FLOATS, "")],
        attributes=required,
    )
    op = values.Op(values.Opset(DOMAIN, 1), name, schema)
    return lambda *args: op(*args[: len(inputs)], **kinds, **dict(zip(attributes, args[len(inputs) :], strict=True)))


def translations() -> dict[Callable[..., Any], Translation]:
    """The `custom_translation_table` of `torch.onnx.export`."""
    ops = torch.ops.vqdeploy
    truncation = [("temperature", "tensor(float)"), ("top_k", _INT64), ("top_p", "tensor(float)")]
    caches = [("key", "T"), ("value", "T")]
    int8_caches = [("key", "tensor(int8)"), ("value", "tensor(int8)")]
    scales = [("key_scale", "tensor(float)"), ("value_scale", "tensor(float)")]
    return {
        ops.nearest.default: _node("VQNearest", [("z", "T"), ("codebook", "C")], [("codes", _INT64)], metric=str),
        ops.residual_quantize.default: _node(
            "VQResidual",
            [("z", "T"), ("codebook", "C")],
            [("codes", _INT64), ("quantized", "T")],
            depth=int,
            metric=str,
        ),
        ops.lookup.default: _node("VQLookup", [("codes", _INT64), ("codebook", "T")], [("vectors", "T")]),
        ops.packed_attention.default: _node("PackedAttention", [("qkv", "T")], [("attention", "T")], heads=int),
        ops.scaled_attention.default: _node(
            "ScaledAttention", [("query", "T"), ("key", "T"), ("value", "T")], [("attention", "T")], heads=int
        ),
        ops.cached_attention.default: _node(
            "CachedAttention", [("qkv", "T"), *caches, ("position", _INT64)], [("attention", "T"), *caches]
        ),
        ops.quantized_cached_attention.default: _node(
            "QuantizedCachedAttention",
            [("qkv", "T"), *int8_caches, ("position", _INT64), *scales],
            [("attention", "T"), *int8_caches],
        ),
        ops.write_cache.default: _node(
            "WriteCache", [("past", "T"), ("entries", "T"), ("position", _INT64)], [("present", "T")]
        ),
        ops.quantized_product.default: _node(
            "QuantizedLinear",
            [("x", "T"), ("weight", "tensor(int8)"), ("scale", "tensor(float)")],
            [("y", "T")],
        ),
        ops.block_quantized_product.default: _node(
            "BlockQuantizedLinear",
            [("x", "T"), ("weight", "tensor(uint8)"), ("scale", "tensor(float)")],
            [("y", "T")],
        ),
        ops.quantized_row_convolution.default: _node(
            "QuantizedRowConvolution",
            [("x", "T"), ("weight", "tensor(int8)"), ("scale", "tensor(float)")],
            [("y", "T")],
            taps=int,
        ),
        ops.quantized_convolution.default: _node(
            "QuantizedConvolution",
            [
                ("x", "T"),
                ("weight", "tensor(int8)"),
                ("scale", "tensor(float)"),
                ("bias", "tensor(int32)"),
                ("step", "tensor(float)"),
                ("zero", "tensor(uint8)"),
                ("output_step", "tensor(float)"),
                ("output_zero", "tensor(uint8)"),
            ],
            [("y", "T")],
            padding=int,
        ),
        ops.sample.default: _node(
            "GumbelSample", [("logits", "T"), ("noise", "tensor(float)"), *truncation], [("codes", _INT64)]
        ),
        ops.truncate.default: _node("TruncatedLogits", [("logits", "T"), *truncation], [("kept", "tensor(float)")]),
    }


def attach(model: onnx_ir.Model) -> None:
    """Adds the function of each `vqdeploy` node to a graph.

    Functions are looked up by name, so a node that needs another body than the first of its name is renamed to `NAME_1`
    and so on. TensorRT has no plugin for that name and runs the body.
    """
    bodies: dict[str, list[dict[str, Any]]] = {}
    for node in (node for node in model.graph if node.domain == DOMAIN):
        varying = {key: node.attributes[key].value for key in _VARYING if key in node.attributes}
        if node.op_type in ("VQResidual", "VQLookup"):
            varying["shared"] = _rank(node.inputs[1]) == 2
        variants = bodies.setdefault(node.op_type, [])
        if varying not in variants:
            variants.append(varying)
        node.op_type = variant_name(node.op_type, variants.index(varying))
    for name, variants in bodies.items():
        for number, varying in enumerate(variants):
            body = function(name, **varying)
            body.name = variant_name(name, number)
            parsed = onnx_ir.serde.deserialize_function(body)
            model.functions[parsed.identifier()] = parsed
    if bodies:
        model.graph.opset_imports[DOMAIN] = 1


def _rank(value: onnx_ir.Value | None) -> int:
    if value is None or value.shape is None:
        raise ValueError(f"{value} has no shape")
    return len(value.shape)


def variant_name(name: str, number: int) -> str:
    """Name of a node with the body of this index among those of its operator."""
    return f"{name}_{number}" if number else name
