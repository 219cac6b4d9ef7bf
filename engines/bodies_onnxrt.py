"""Bodies of the `vqdeploy` functions for ONNX Runtime, made of its own operators where those are faster.

A package carries portable bodies. The builder for ONNX Runtime swaps these in, and tests compare the two.
"""

import onnx

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

# Sorts as many logits as the request needs: none when it cuts nothing off, the first 2,048 for top-p when their
# probability reaches p, which in a trained prior is the rule.
_GUMBEL_SAMPLE = """
<opset_import: ["" : 24], domain: "vqdeploy">
GumbelSample (logits, noise, temperature, top_k, top_p) => (codes)
{
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
    >
    perturbed = Add (kept, noise)
    codes = ArgMax <axis = 1, keepdims = 0> (perturbed)
}"""


# ArgMax of ONNX Runtime looks at one number at a time; ReduceMax does not, and leaves one block to look at.
_BLOCK = 64
_ARG_MAX_BY_BLOCKS = f"""
<opset_import: ["" : 24], domain: "vqdeploy">
ArgMaxByBlocks (scores) => (codes)
{{
    within = Constant <value_ints = [2]> ()
    first = Constant <value_ints = [1]> ()
    ones = Constant <value_ints = [1, 1]> ()
    size = Constant <value_int = {_BLOCK}> ()
    split = Constant <value_ints = [0, -1, {_BLOCK}]> ()
    blocks = Reshape (scores, split)
    highest = ReduceMax <keepdims = 0> (blocks, within)
    block = ArgMax <axis = 1, keepdims = 1> (highest)
    block_column = Unsqueeze (block, within)
    width = Shape <start = 2> (blocks)
    picks_shape = Concat <axis = 0> (ones, width)
    picks = Expand (block_column, picks_shape)
    winners = GatherElements <axis = 1> (blocks, picks)
    place = ArgMax <axis = 2, keepdims = 0> (winners)
    start = Mul (block, size)
    code_column = Add (start, place)
    codes = Squeeze (code_column, first)
}}"""

# ONNX Runtime has no kernel for GroupNormalization and would expand it into twice as many passes over the map. Its
# InstanceNormalization is fp32; what casts there are in fp32 vanish.
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
    """Replaces the bodies of a graph's functions.

    `heads` is the number of attention heads of the caches; with 0 cached attention keeps its body.
    """
    graph = model.graph
    bodies = {"GumbelSample": onnx.parser.parse_function(_GUMBEL_SAMPLE)}
    for node in graph.node:
        if node.op_type == "PackedAttention":
            (own_heads,) = (attribute.i for attribute in node.attribute if attribute.name == "heads")
            bodies[node.op_type] = onnx.parser.parse_function(_PACKED_ATTENTION.format(heads=own_heads))
        if node.op_type == "GroupNormalization":
            node.domain, node.op_type = "vqdeploy", "GroupNorm"
    functions = [bodies.get(function.name, function) for function in model.functions]
    if _whole_blocks(graph):
        for function in functions:
            _search_by_blocks(function)
    own = (_GROUP_NORM, _CACHE_EXTENTS, _ARG_MAX_BY_BLOCKS)
    del model.functions[:]
    model.functions.extend([*functions, *map(onnx.parser.parse_function, own)])
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    if heads:
        _use_prefix_attention(graph, heads)
    _keep_called(model)


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


def _whole_blocks(graph: onnx.GraphProto) -> bool:
    """Whether all codebooks of a graph fall into whole blocks of codes."""
    used = {node.input[1] for node in graph.node if node.op_type in ("VQNearest", "VQResidual")}
    sizes = {initializer.name: initializer.dims[0] for initializer in graph.initializer if initializer.dims}
    return all(sizes.get(name, 1) % _BLOCK == 0 for name in used)


def _search_by_blocks(function: onnx.FunctionProto) -> None:
    """Replaces the ArgMax of a quantizer over all codes."""
    if function.name in ("VQNearest", "VQResidual"):
        function.opset_import.append(onnx.helper.make_opsetid("vqdeploy", 1))
        for node in function.node:
            if node.op_type == "ArgMax":
                node.CopyFrom(onnx.helper.make_node("ArgMaxByBlocks", node.input, node.output, domain="vqdeploy"))


def _use_prefix_attention(graph: onnx.GraphProto, heads: int) -> None:
    """Lets cached attention read only the places in use, and queries, keys and values as they leave the projection."""
    nodes: list[onnx.NodeProto] = []
    extents: dict[str, list[str]] = {}  # of each tensor of positions; all layers see entries of one length
    for node in graph.node:
        if node.op_type == "CachedAttention":
            qkv, key, value, position = node.input
            if position not in extents:
                extents[position] = [f"{position}_last_int32", f"{position}_total_int32"]
                nodes.append(
                    onnx.helper.make_node("CacheExtents", [qkv, position], extents[position], domain="vqdeploy")
                )
            node = onnx.helper.make_node(
                "GroupQueryAttention",
                [qkv, "", "", key, value, *extents[position]],
                node.output,
                node.name,
                domain="com.microsoft",
                num_heads=heads,
                kv_num_heads=heads,
                scale=1.0,
            )
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
