"""A text-conditioned RQ-Transformer in numpy, written from the paper, on the names of a public `state_dict`.

Lee et al., "Autoregressive Image Generation using Residual Quantization" (CVPR 2022), section 3.2: the tokens of the
text come first, each entry attends to itself and those before it, and nothing is cached. It shares no code with what
it checks, and it loops where that is in arrays.
"""

import math

import numpy as np

Weights = dict[str, np.ndarray]


def norm(x, weights, name):
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def stack(x, weights, name, heads):
    """Blocks on entries [S, width], each entry on its own."""
    layer, side = 0, x.shape[1] // heads
    while f"{name}.blocks.{layer}.ln1.weight" in weights:
        block = f"{name}.blocks.{layer}"
        h = norm(x, weights, f"{block}.ln1")
        queries, keys, values = (linear(h, weights, f"{block}.attn.{part}") for part in ("query", "key", "value"))
        mixed = np.empty_like(x)
        for entry in range(len(x)):
            for head in range(heads):
                own = slice(head * side, (head + 1) * side)
                scores = np.exp(keys[: entry + 1, own] @ queries[entry, own] / math.sqrt(side))
                mixed[entry, own] = scores / scores.sum() @ values[: entry + 1, own]
        x = x + linear(mixed, weights, f"{block}.attn.proj")
        inner = gelu(linear(norm(x, weights, f"{block}.ln2"), weights, f"{block}.mlp.0"))
        x = x + linear(inner, weights, f"{block}.mlp.2")
        layer += 1
    return x


def logits_after(weights: Weights, codebook: np.ndarray, heads: int, text, positions, depths) -> np.ndarray:
    """Logits [K] of the next code, given a text, the codes of whole positions, and the first depths of the next one."""
    entries = [weights["cond_emb.weight"][word] + weights["pos_emb_cond"][0, i] for i, word in enumerate(text)]
    for place, codes in enumerate(positions):
        parts = [linear(codebook[code], weights, "input_mlp") for code in codes]
        entries.append(sum(parts) + weights["pos_emb_hw"][0, place])
    context = stack(np.array(entries), weights, "body_transformer", heads)[-1]
    inner = [context + weights["pos_emb_d"][0, 0]]
    for depth in range(1, len(depths) + 1):
        before = sum(codebook[code] for code in depths[:depth])
        inner.append(linear(before, weights, "head_mlp") + weights["pos_emb_d"][0, depth])
    last = stack(np.array(inner), weights, "head_transformer", heads)[-1]
    return linear(norm(last, weights, "classifier.layer_norm"), weights, "classifier.linear")


def forced(weights: Weights, codebook: np.ndarray, heads: int, text, codes) -> np.ndarray:
    """Teacher-forced logits [positions, Q, K] of codes [positions, Q]."""
    return np.array(
        [
            [logits_after(weights, codebook, heads, text, codes[:place], row[:depth]) for depth in range(len(row))]
            for place, row in enumerate(codes)
        ]
    )


def greedy(weights: Weights, codebook: np.ndarray, heads: int, text, count: int, depth: int) -> np.ndarray:
    """The likeliest code of each position and depth, one after the other [count, depth]."""
    drawn: list[list[int]] = []
    for _ in range(count):
        row: list[int] = []
        for _ in range(depth):
            row.append(int(logits_after(weights, codebook, heads, text, drawn, row).argmax()))
        drawn.append(row)
    return np.array(drawn)
