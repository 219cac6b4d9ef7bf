"""Bodies of the `vqdeploy` functions for ONNX Runtime, which use its own operators where they are faster.

A package has portable bodies. The builder for ONNX Runtime replaces them by these, and tests compare the two.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import onnx

from vqdeploy.errors import ArtifactError

T = TypeVar("T")

# What each layer's attention wants to know of the positions, once for all layers: a node each takes longer than it is
# worth.
_CACHE_EXTENTS = """
<opset_import: ["" : 24], domain: "vqdeploy">
CacheExtents (qkv, position) => (last_int32, total_int32)
{
    batch_axis = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    length = Shape <start = 1, end = 2> (qkv)
    end = Add (position, length)
    last = Sub (end, one)
    last_int32 = Cast <to = 6> (last)
    total = ReduceMax <keepdims = 0> (end, batch_axis)
    total_int32 = Cast <to = 6> (total)
}"""

_PACKED_ATTENTION = """
<opset_import: ["" : 24, "com.microsoft" : 1], domain: "vqdeploy">
PackedAttention (qkv) => (attention)
{{
    query, key, value = Split <axis = -1, num_outputs = 3> (qkv)
    attention = com.microsoft.MultiHeadAttention <num_heads = {heads}, scale = 1.0> (query, key, value)
}}"""

_SCALED_ATTENTION = """
<opset_import: ["" : 24, "com.microsoft" : 1], domain: "vqdeploy">
ScaledAttention (query, key, value) => (attention)
{{
    attention = com.microsoft.MultiHeadAttention <num_heads = {heads}, scale = 1.0> (query, key, value)
}}"""

# Sorts only as many logits as needed: none without truncation, the top 2,048 for top-p if their probability reaches p,
# as it usually does for a trained prior.
_TRUNCATION = """
    axis = Constant <value_ints = [1]> ()
    one = Constant <value = float {1.0}> ()
    logits_fp32 = Cast <to = 1> (logits)
    divisor = Unsqueeze (temperature, axis)
    scaled = Div (logits_fp32, divisor)
    size = Shape <start = 1, end = 2> (logits)
    cut_k = Less (top_k, size)
    cut_p = Less (top_p, one)
    cut = Or (cut_k, cut_p)
    cut_int = Cast <to = 7> (cut)
    any_int = ReduceMax <keepdims = 0> (cut_int)
    any = Cast <to = 9> (any_int)
    kept = If (any) <
        then_branch = truncate () => (truncated) {
            batch_axis = Constant <value_ints = [0]> ()
            code_axis = Constant <value_int = 1> ()
            one_int = Constant <value_ints = [1]> ()
            plenty = Constant <value_ints = [2048]> ()
            removed = Constant <value = float {-1e30}> ()
            infinity = Constant <value = float {1e38}> ()
            mass = Unsqueeze (top_p, axis)
            cut_k_column = Unsqueeze (cut_k, axis)

            needed_k = Where (cut_k, top_k, one_int)
            needed_p = Where (cut_p, top_k, one_int)
            most_k = ReduceMax <keepdims = 1> (needed_k, batch_axis)
            most_p = ReduceMax <keepdims = 1> (needed_p, batch_axis)
            few_p = Min (most_p, plenty)
            few = Max (most_k, few_p)
            ordered_few, order_few = TopK <axis = 1> (scaled, few)
            place = Sub (needed_k, one_int)
            place_column = Unsqueeze (place, axis)
            kth_any = GatherElements <axis = 1> (ordered_few, place_column)
            kth = Where (cut_k_column, kth_any, removed)

            top = ReduceMax <keepdims = 1> (scaled, axis)
            below_k = Less (scaled, kth)
            survivors = Where (below_k, removed, scaled)
            shifted = Sub (survivors, top)
            weights = Exp (shifted)
            total = ReduceSum <keepdims = 1> (weights, axis)
            shifted_few = Sub (ordered_few, top)
            weights_few = Exp (shifted_few)
            weight_few = ReduceSum <keepdims = 1> (weights_few, axis)
            mass_few = Div (weight_few, total)
            reached = GreaterOrEqual (mass_few, mass)
            uncut_p = GreaterOrEqual (mass, one)
            settled = Or (reached, uncut_p)
            settled_int = Cast <to = 7> (settled)
            all_settled_int = ReduceMin <keepdims = 0> (settled_int)
            all_settled = Cast <to = 9> (all_settled_int)
            ordered = If (all_settled) <
                then_branch = enough () => (part) { part = Identity (ordered_few) },
                else_branch = sort_all () => (whole_order) {
                    more = Max (most_k, most_p)
                    whole_order, order = TopK <axis = 1> (scaled, more)
                }
            >

            ordered_shifted = Sub (ordered, top)
            ordered_weights = Exp (ordered_shifted)
            probabilities = Div (ordered_weights, total)
            before = CumSum <exclusive = 1> (probabilities, code_axis)
            within_p = Less (before, mass)
            within_k = GreaterOrEqual (ordered, kth)
            within = And (within_p, within_k)
            within_values = Where (within, ordered, infinity)
            lowest = ReduceMin <keepdims = 1> (within_values, axis)
            threshold_p = Min (lowest, top)
            threshold = Where (uncut_p, kth, threshold_p)
            outside = Less (scaled, threshold)
            truncated = Where (outside, removed, scaled)
        },
        else_branch = keep () => (whole) { whole = Identity (scaled) }
    >"""

_TRUNCATED_LOGITS = f"""
<opset_import: ["" : 24], domain: "vqdeploy">
TruncatedLogits (logits, temperature, top_k, top_p) => (kept)
{{{_TRUNCATION}
}}"""

_GUMBEL_SAMPLE = f"""
<opset_import: ["" : 24], domain: "vqdeploy">
GumbelSample (logits, noise, temperature, top_k, top_p) => (codes)
{{{_TRUNCATION}
    perturbed = Add (kept, noise)
    codes = ArgMax <axis = 1, keepdims = 0> (perturbed)
}}"""


# The best code of each vector, in blocks of vectors whose scores fit the cache of a core: no N x K matrix is stored.
# ArgMax of ONNX Runtime is scalar; ReduceMax is vectorized, and leaves 64 scores for ArgMax. `vqdeploy.runtime.graphs`
# recognizes this function by its digest: it is the only one that may contain a Loop.
_BLOCK = 64
_SEARCH_BY_ROWS = f"""
<opset_import: ["" : 24], domain: "vqdeploy">
SearchByRows (vectors, directions, offsets) => (codes)
{{
    first = Constant <value_ints = [0]> ()
    third = Constant <value_ints = [2]> ()
    one = Constant <value_ints = [1]> ()
    zero_number = Constant <value_int = 0> ()
    one_number = Constant <value_int = 1> ()
    block = Constant <value_ints = [{_BLOCK}]> ()
    line = Constant <value_ints = [-1, {_BLOCK}]> ()
    most_scores = Constant <value_ints = [{2**18}]> ()
    most_trips = Constant <value_ints = [{2**20}]> ()
    split = Constant <value_ints = [0, -1, {_BLOCK}]> ()
    yes = Constant <value = bool {{1}}> ()
    number = Shape <start = 0, end = 1> (vectors)
    width = Shape <start = 1, end = 2> (vectors)
    size = Shape <start = 0, end = 1> (offsets)
    at_most = Div (most_scores, size)
    most = Max (at_most, block)
    number_less = Sub (number, one)
    full = Div (number_less, most)
    needed = Add (full, one)
    count_low = Max (needed, one)
    count = Min (count_low, most_trips)
    share = Div (number_less, count)
    share_more = Add (share, one)
    rows = Max (share_more, one)
    filled = Mul (count, rows)
    lacking = Sub (filled, number)
    zeros_shape = Concat <axis = 0> (lacking, width)
    zeros = ConstantOfShape <value = float[1] {{0.0}}> (zeros_shape)
    all_vectors = Concat <axis = 0> (vectors, zeros)
    blocks_shape = Concat <axis = 0> (count, rows, width)
    blocks = Reshape <allowzero = 1> (all_vectors, blocks_shape)
    trips = Squeeze (count, first)
    rows_number = Squeeze (rows, first)
    row_numbers = Range (zero_number, rows_number, one_number)
    lines_of_row = Div (size, block)
    starts = Mul (row_numbers, lines_of_row)
    found = Loop (trips, yes) <
        body = search (int64 i, bool go) => (bool goes, codes_of_block) {{
            goes = Identity (go)
            part = Gather <axis = 0> (blocks, i)
            scores = Gemm (part, directions, offsets)
            by_block = Reshape (scores, split)
            highest = ReduceMax <keepdims = 0> (by_block, third)
            best = ArgMax <axis = 1, keepdims = 0> (highest)
            lines = Reshape (scores, line)
            winner = Add (starts, best)
            winners = Gather <axis = 0> (lines, winner)
            place = ArgMax <axis = 1, keepdims = 0> (winners)
            start = Mul (best, block)
            codes_of_block = Add (start, place)
        }}
    >
    every = Reshape <allowzero = 1> (found, filled)
    codes = Slice (every, first, number, first)
}}"""

# A codebook prepared for search: the score `vector @ directions + offsets` is higher for nearer codes. The padding of
# the last block has the lowest score.
_LAID_OUT = {
    "l2": """
    squares{book} = Mul (table{book}, table{book})
    norms{book} = ReduceSum <keepdims = 0> (squares{book}, columns)
    offset{book} = Neg (norms{book})
    transposed{book} = Transpose <perm = [1, 0]> (table{book})
    direction{book} = Mul (transposed{book}, two)""",
    "cosine": """
    lengths{book} = ReduceL2 <keepdims = 1> (table{book}, columns)
    divisors{book} = Max (lengths{book}, smallest)
    units{book} = Div (table{book}, divisors{book})
    direction{book} = Transpose <perm = [1, 0]> (units{book})
    offset{book} = ConstantOfShape <value = float[1] {{0.0}}> (size)""",
    "dot": """
    direction{book} = Transpose <perm = [1, 0]> (table{book})
    offset{book} = ConstantOfShape <value = float[1] {{0.0}}> (size)""",
}
_FILLED = """
    directions{book} = Pad (direction{book}, missing_columns)
    offsets{book} = Pad (offset{book}, missing, farthest)"""

_SHARED_BOOK = """
    table = Cast <to = 1> (codebook)
    size = Shape <start = 0, end = 1> (codebook)"""


def _split_books(depth: int) -> str:
    """Splits the codebooks [Q, K, D]."""
    parts = ", ".join(f"part_{d}" for d in range(depth))
    apart = "".join(f"    table_{d} = Squeeze (part_{d}, first)\n" for d in range(depth))
    return f"""
    size = Shape <start = 1, end = 2> (codebook)
    books = Cast <to = 1> (codebook)
    {parts} = Split <axis = 0, num_outputs = {depth}> (books)
{apart}"""


def _search(head: str, metric: str, books: list[str], shared: bool, end: str) -> str:
    """A search at each depth for the residual of the one before.

    Args:
        head: Name, inputs and outputs of the function.
        metric: `l2`, `cosine` or `dot`.
        books: Suffix of the codebook of each depth.
        shared: Whether all depths have one codebook.
        end: Text that computes the outputs.
    """
    steps = "".join(
        f"""
    found_{d} = vqdeploy.SearchByRows (residual_{d}, directions{book}, offsets{book})
    code_{d} = Min (found_{d}, last)
    column_{d} = Unsqueeze (code_{d}, columns)
    vector_{d} = Gather <axis = 0> (table{book}, code_{d})
    residual_{d + 1} = Sub (residual_{d}, vector_{d})"""
        for d, book in enumerate(books)
    )
    return f"""
<opset_import: ["" : 24, "vqdeploy" : 1], domain: "vqdeploy">
{head}
{{
    first = Constant <value_ints = [0]> ()
    columns = Constant <value_ints = [1]> ()
    three_zeros = Constant <value_ints = [0, 0, 0]> ()
    block = Constant <value_ints = [{_BLOCK}]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value = float {{2.0}}> ()
    smallest = Constant <value = float {{1e-12}}> ()
    farthest = Constant <value = float {{-3e38}}> ()
    residual_0 = Cast <to = 1> (z)
{_SHARED_BOOK if shared else _split_books(len(books))}
    negative = Neg (size)
    short = Mod (negative, block)
    missing = Concat <axis = 0> (first, short)
    missing_columns = Concat <axis = 0> (three_zeros, short)
    last = Sub (size, one)
{"".join((_LAID_OUT[metric] + _FILLED).format(book=book) for book in dict.fromkeys(books))}
{steps}
{end}
}}"""


def _quantizer(node: onnx.NodeProto, shared: bool) -> onnx.FunctionProto:
    """The function for a quantizer node."""
    metric = _attribute(node, "metric", ("l2", "cosine", "dot"))
    if node.op_type.startswith("VQNearest"):
        head = "VQNearest (z, codebook) => (codes)"
        return onnx.parser.parse_function(_search(head, metric, [""], True, "    codes = Identity (code_0)"))
    depth = _attribute(node, "depth", range(1, 257))
    columns, vectors = (", ".join(f"{name}_{d}" for d in range(depth)) for name in ("column", "vector"))
    end = f"""
    codes = Concat <axis = 1> ({columns})
    total = Sum ({vectors})
    quantized = CastLike (total, z)"""
    books = [""] * depth if shared else [f"_{d}" for d in range(depth)]
    head = "VQResidual (z, codebook) => (codes, quantized)"
    return onnx.parser.parse_function(_search(head, metric, books, shared, end))


# Integers of 8 bits; 128 stands for zero. Where the largest is 0 the integers are undefined, and worth 0 each.
_ROUND = """
    step = Constant <value = float {0.007874015748031496}> ()
    zero = Constant <value = uint8 {128}> ()
    sizes = Abs (x)
    largest = ReduceMax <keepdims = 1> (sizes, axes)
    units = Div (x, largest)
    integers = QuantizeLinear (units, step, zero)"""
_MULTIPLY = """
    products_float = Cast <to = 1> (products)
    by_largest = Mul (products_float, largest)
    step_scale = Mul (scale, step)
    y = Mul (by_largest, step_scale)"""

# Integer products of activations that are rounded row by row, so that an image does not depend on its batch.
_QUANTIZED_LINEAR = f"""
<opset_import: ["" : 24], domain: "vqdeploy">
QuantizedLinear (x, weight, scale) => (y)
{{
    axes = Constant <value_ints = [-1]> ()
    {_ROUND}
    products = MatMulInteger (integers, weight, zero)
    {_MULTIPLY}
}}"""


def _quantized_row_convolution(taps: int) -> str:
    """Integer products of the windows of a row, which is rounded as a whole before there are `taps` copies of it."""
    windows = "".join(
        f"""
    start_{tap} = Constant <value_ints = [{tap}]> ()
    stop_{tap} = Constant <value_ints = [{tap + 1 - taps or 1 << 31}]> ()
    window_{tap} = Slice (padded, start_{tap}, stop_{tap}, axis)"""
        for tap in range(taps)
    )
    return f"""
<opset_import: ["" : 24], domain: "vqdeploy">
QuantizedRowConvolution (x, weight, scale) => (y)
{{
    axes = Constant <value_ints = [1, 2]> ()
    {_ROUND}
    axis = Constant <value_ints = [1]> ()
    pads = Constant <value_ints = [0, {taps // 2}, 0, 0, {taps // 2}, 0]> ()
    padded = Pad (integers, pads, zero)
    {windows}
    rows = Concat <axis = 2> ({", ".join(f"window_{tap}" for tap in range(taps))})
    products = MatMulInteger (rows, weight, zero)
    {_MULTIPLY}
}}"""


# ONNX Runtime has no kernel for GroupNormalization and would expand it into twice as many passes over the map. Its
# InstanceNormalization is fp32; in fp32 graphs the casts are removed.
_GROUP_NORM = """
<opset_import: ["" : 24], domain: "vqdeploy">
GroupNorm <num_groups, epsilon> (x, scale, bias) => (y)
{
    batch = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    columns = Constant <value_ints = [1, 2]> ()
    one = Constant <value = float {1.0}> ()
    zero = Constant <value = float {0.0}> ()
    count = Constant <value_int: int = @num_groups> ()
    groups = Unsqueeze (count, batch)
    grouped_shape = Concat <axis = 0> (batch, groups, rest)
    grouped_any = Reshape (x, grouped_shape)
    grouped = Cast <to = 1> (grouped_any)
    ones = Expand (one, groups)
    zeros = Expand (zero, groups)
    normalized = InstanceNormalization <epsilon: float = @epsilon> (grouped, ones, zeros)
    shape = Shape (x)
    maps = Reshape (normalized, shape)
    scale_fp32 = Cast <to = 1> (scale)
    bias_fp32 = Cast <to = 1> (bias)
    scale_columns = Unsqueeze (scale_fp32, columns)
    bias_columns = Unsqueeze (bias_fp32, columns)
    scaled = Mul (maps, scale_columns)
    shifted = Add (scaled, bias_columns)
    y = CastLike (shifted, x)
}"""


def swap_in(model: onnx.ModelProto, heads: int) -> None:
    """Replaces the function bodies of a graph.

    `heads` is the number of attention heads of the KV caches; with 0, cached attention keeps its portable body.
    """
    graph = model.graph
    bodies = {
        "GumbelSample": onnx.parser.parse_function(_GUMBEL_SAMPLE),
        "TruncatedLogits": onnx.parser.parse_function(_TRUNCATED_LOGITS),
        "QuantizedLinear": onnx.parser.parse_function(_QUANTIZED_LINEAR),
    }
    attentions = {"PackedAttention": _PACKED_ATTENTION, "ScaledAttention": _SCALED_ATTENTION}
    for node in graph.node:
        if node.op_type in attentions:
            body = attentions[node.op_type].format(heads=_attribute(node, "heads", range(1, 1025)))
            bodies[node.op_type] = onnx.parser.parse_function(body)
        if node.op_type.startswith("QuantizedRowConvolution"):
            taps = _attribute(node, "taps", range(1, 257, 2))
            bodies[node.op_type] = onnx.parser.parse_function(_quantized_row_convolution(taps))
        if node.op_type == "GroupNormalization":
            node.domain, node.op_type = "vqdeploy", "GroupNorm"
    ranks = _ranks(graph)
    for node in graph.node:
        if node.op_type.startswith(("VQNearest", "VQResidual")):
            bodies[node.op_type] = _quantizer(node, shared=ranks.get(node.input[1], 2) == 2)
    for name, function in bodies.items():
        function.name = name  # not by the text: in a damaged package a name may be anything
    functions = [bodies.get(function.name, function) for function in model.functions]
    own = (_GROUP_NORM, _CACHE_EXTENTS, _SEARCH_BY_ROWS)
    del model.functions[:]
    model.functions.extend([*functions, *map(onnx.parser.parse_function, own)])
    used = {opset.domain for opset in model.opset_import}
    model.opset_import.extend(onnx.helper.make_opsetid(d, 1) for d in ("com.microsoft", "vqdeploy") if d not in used)
    if heads:
        _use_prefix_attention(graph, heads)
    _use_block_products(graph)
    _keep_called(model)


def _attribute(node: onnx.NodeProto, name: str, allowed: Sequence[T]) -> T:
    """An attribute of a node, on which its body depends.

    Raises:
        ArtifactError: It has none, or one that is not allowed: packages may be damaged.
    """
    values = [onnx.helper.get_attribute_value(attribute) for attribute in node.attribute if attribute.name == name]
    decoded = [value.decode(errors="replace") if isinstance(value, bytes) else value for value in values]
    for value in allowed:
        if decoded == [value]:
            return value
    raise ArtifactError(f"{node.op_type} has no attribute {name} that is supported", fix="vqdeploy export")


def _keep_called(model: onnx.ModelProto) -> None:
    """Drops the functions that no node calls any more: a plan's graph holds none such."""
    functions = {function.name: function for function in model.functions}
    called: dict[str, onnx.FunctionProto] = {}
    waiting = [node.op_type for node in model.graph.node if node.domain == "vqdeploy"]
    while waiting:
        name = waiting.pop()
        if name not in called:
            called[name] = functions[name]
            waiting += [node.op_type for node in functions[name].node if node.domain == "vqdeploy"]
    del model.functions[:]
    model.functions.extend(called.values())


def _ranks(graph: onnx.GraphProto) -> dict[str, int]:
    """Rank of the tensors of a graph with a known shape."""
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.value_info)}
    return ranks | {initializer.name: len(initializer.dims) for initializer in graph.initializer}


def _use_block_products(graph: onnx.GraphProto) -> None:
    """Replaces matrix products with weights in 4 bits by MatMulNBits, which takes the weights as they are.

    It quantizes activations to 8 bits by blocks of a row, so that an image does not depend on its batch.
    """
    shapes = {initializer.name: initializer.dims for initializer in graph.initializer}
    for node in graph.node:
        if node.op_type == "BlockQuantizedLinear" and len(shapes.get(node.input[1], ())) == 3:
            outputs, blocks, half = shapes[node.input[1]]
            node.CopyFrom(block_product(node, node.input, blocks * 2 * half, outputs, 4, 2 * half))


def block_product(
    node: onnx.NodeProto, inputs: Sequence[str], rows: int, columns: int, bits: int, block: int
) -> onnx.NodeProto:
    """MatMulNBits in place of a node: a product with a matrix of integers, in which blocks of inputs have a scale.

    `accuracy_level` 4 quantizes activations to 8 bits.
    """
    sizes: dict[str, Any] = {"K": rows, "N": columns, "bits": bits, "block_size": block, "accuracy_level": 4}
    return onnx.helper.make_node("MatMulNBits", inputs, node.output, node.name, domain="com.microsoft", **sizes)


CACHED = ("CachedAttention", "QuantizedCachedAttention")
"""Operators with KV caches, after qkv in their inputs."""
_INT8_CACHES: dict[str, Any] = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}


def _use_prefix_attention(graph: onnx.GraphProto, heads: int) -> None:
    """Replaces cached attention by GroupQueryAttention on packed projections, which reads only positions in use."""
    nodes: list[onnx.NodeProto] = []
    extents: dict[str, list[str]] = {}  # one for each tensor of positions, shared by all layers
    for node in graph.node:
        if node.op_type in CACHED:
            qkv, key, value, position, *scales = node.input
            if position not in extents:
                extents[position] = [f"{position}_last_int32", f"{position}_total_int32"]
                nodes.append(
                    onnx.helper.make_node("CacheExtents", [qkv, position], extents[position], domain="vqdeploy")
                )
            node = onnx.helper.make_node(
                "GroupQueryAttention",
                [qkv, "", "", key, value, *extents[position], *([*[""] * 5, *scales] if scales else [])],
                node.output,
                node.name,
                domain="com.microsoft",
                num_heads=heads,
                kv_num_heads=heads,
                scale=1.0,
                **(_INT8_CACHES if scales else {}),
            )
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
