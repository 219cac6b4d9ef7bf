"""Bodies of the `vqdeploy` functions for ONNX Runtime, made of its own operators where those are faster.

A package carries portable bodies. The builder for ONNX Runtime swaps these in, and tests compare the two.
"""

import onnx

# Reads only the places in use, and takes queries, keys and values as they leave the projection.
_CACHED_ATTENTION = """
<opset_import: ["" : 24, "com.microsoft" : 1], domain: "vqdeploy">
CachedAttention (qkv, past_key, past_value, position) => (attention, present_key, present_value)
{{
    batch_axis = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    length = Shape <start = 1, end = 2> (qkv)
    end = Add (position, length)
    last = Sub (end, one)
    last_int32 = Cast <to = 6> (last)
    total = ReduceMax <keepdims = 0> (end, batch_axis)
    total_int32 = Cast <to = 6> (total)
    attention, present_key, present_value = com.microsoft.GroupQueryAttention
        <num_heads = {heads}, kv_num_heads = {heads}, scale = 1.0>
        (qkv, , , past_key, past_value, last_int32, total_int32)
}}"""

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


# ONNX Runtime has no kernel for GroupNormalization and would expand it into twice as many passes over the map.
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
    grouped = Reshape (x, grouped_shape)
    ones = Expand (one, groups)
    zeros = Expand (zero, groups)
    normalized = InstanceNormalization <epsilon: float = @epsilon> (grouped, ones, zeros)
    shape = Shape (x)
    maps = Reshape (normalized, shape)
    scale_columns = Unsqueeze (scale, columns)
    bias_columns = Unsqueeze (bias, columns)
    scaled = Mul (maps, scale_columns)
    y = Add (scaled, bias_columns)
}"""


def swap_in(model: onnx.ModelProto, heads: int) -> None:
    """Replaces the bodies of a graph's functions. `heads` is the number of attention heads of the caches."""
    bodies = {
        "CachedAttention": onnx.parser.parse_function(_CACHED_ATTENTION.format(heads=heads)),
        "GumbelSample": onnx.parser.parse_function(_GUMBEL_SAMPLE),
    }
    for node in model.graph.node:
        if node.op_type == "PackedAttention":
            (own_heads,) = (attribute.i for attribute in node.attribute if attribute.name == "heads")
            bodies[node.op_type] = onnx.parser.parse_function(_PACKED_ATTENTION.format(heads=own_heads))
        if node.op_type == "GroupNormalization":
            node.domain, node.op_type = "vqdeploy", "GroupNorm"
    functions = [bodies.get(function.name, function) for function in model.functions]
    del model.functions[:]
    model.functions.extend([*functions, onnx.parser.parse_function(_GROUP_NORM)])
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
