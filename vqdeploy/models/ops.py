"""The operators that an exported graph keeps as single nodes of domain `vqdeploy`.

Each has a reference implementation in PyTorch here, and an ONNX function in `vqdeploy.export.functions`. Distances and
the arg-min are fp32 for all input types; ties go to the lowest index. On CUDA tensors, if Triton is installed, the
quantizers run the kernels of `vqdeploy.kernels`, which store no [N, K] matrix.

The metric of a search is `l2` (smallest distance), `cosine` (smallest angle) or `dot` (largest product with the
codebook as stored).
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import ParamSpec, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Operator(Protocol[P, R]):
    """A custom operator of PyTorch, called like its reference function."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def register_fake(self, function: Callable[P, R], /) -> Callable[P, R]:
        """Registers the fake implementation, which infers shapes and dtypes of the results."""

    def register_kernel(self, device: str, /) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Registers an implementation for a device type."""


def operator(name: str) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Registers a function as custom operator of domain `vqdeploy`."""
    return torch.library.custom_op(f"vqdeploy::{name}", mutates_args=())


@operator("nearest")
def nearest(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """Nearest vector of the codebook.

    Args:
        z: Vectors [N, D].
        codebook: Codebook [K, D].
        metric: `l2`, `cosine` or `dot`.

    Returns:
        Codes [N] int64.
    """
    return scores(z.float(), codebook.float(), metric).argmax(-1)


def scores(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """Scores [N, K] of codes for vectors [N, D], comparable within a row: the nearest code has the highest."""
    if metric == "l2":
        return 2 * (z @ codebook.T) - codebook.square().sum(1)
    return z @ (F.normalize(codebook, dim=1) if metric == "cosine" else codebook).T


@nearest.register_fake
def _(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return z.new_empty((z.shape[0],), dtype=torch.int64)


@operator("quantized_product")
def quantized_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Product with a matrix of small integers.

    Args:
        x: Rows [..., inputs].
        weight: Integers int8 [inputs, outputs].
        scale: What an integer of each column is worth [outputs].

    Returns:
        Rows [..., outputs] in the type of `x`.
    """
    return x @ (weight * scale).to(x.dtype)


@quantized_product.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@operator("block_quantized_product")
def block_quantized_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Product with a matrix of 4 bits, scaled by blocks of inputs.

    Args:
        x: Rows [..., inputs].
        weight: Pairs of integers 0..15, of which 8 stands for zero, uint8 [outputs, blocks, block / 2]; the first of a
            pair is in the lower half of its byte.
        scale: What an integer of each block is worth [outputs, blocks].

    Returns:
        Rows [..., outputs] in the type of `x`.
    """
    integers = torch.stack([weight & 15, weight >> 4], -1).flatten(2).to(scale.dtype) - 8
    return x @ (integers * scale[..., None]).flatten(1).T.to(x.dtype)


@block_quantized_product.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@operator("quantized_row_convolution")
def quantized_row_convolution(x: Tensor, weight: Tensor, scale: Tensor, taps: int) -> Tensor:
    """Convolution along a row with a kernel of small integers, as a product with windows of the row.

    Args:
        x: Rows [B, w, inputs].
        weight: Integers int8 [taps * inputs, outputs], of which the first `inputs` are for the leftmost tap.
        scale: What an integer of each column is worth [outputs].
        taps: Width of the kernel, odd. Rows have `taps // 2` zeros on each side.

    Returns:
        Rows [B, w, outputs] in the type of `x`.
    """
    return windows(x, taps) @ (weight * scale).to(x.dtype)


def windows(x: Tensor, taps: int) -> Tensor:
    """What each tap sees of a row [B, w, inputs], with zeros at both ends -> [B, w, taps * inputs]."""
    padded = F.pad(x, (0, 0, taps // 2, taps // 2))
    return padded.unfold(1, taps, 1).transpose(2, 3).flatten(2)


@quantized_row_convolution.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, taps: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@operator("quantized_convolution")
def quantized_convolution(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    step: Tensor,
    zero: Tensor,
    output_step: Tensor,
    output_zero: Tensor,
    padding: int,
) -> Tensor:
    """Convolution of 8-bit integers, to which the maps that come in and go out are rounded.

    Args:
        x: Maps [B, inputs, H, W].
        weight: Integers int8 [outputs, inputs, height, width].
        scale: What an integer of each output's kernel is worth [outputs].
        bias: Integers int32 [outputs], worth `scale * step` each.
        step: What an integer of `x` is worth [].
        zero: The integer that stands for zero in `x`, uint8 [].
        output_step: The same of the result [].
        output_zero: The same of the result, uint8 [].
        padding: Zeros on each side of the maps.

    Returns:
        Maps [B, outputs, H', W'] in the type of `x`.
    """
    units = scale * step
    kernel = weight * scale[:, None, None, None]
    y = F.conv2d(_rounded(x, step, zero), kernel, bias * units, padding=padding)
    return _rounded(y, output_step, output_zero).to(x.dtype)


def _rounded(x: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """Rounds numbers to those that integers of 8 bits stand for."""
    integers = (x / step).round() + zero
    return (integers.clamp(0, 255) - zero) * step


@quantized_convolution.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    step: Tensor,
    zero: Tensor,
    output_step: Tensor,
    output_zero: Tensor,
    padding: int,
) -> Tensor:
    height, width = (x.shape[axis] + 2 * padding - weight.shape[axis] + 1 for axis in (2, 3))
    return x.new_empty((x.shape[0], weight.shape[0], height, width))


@operator("residual_quantize")
def residual_quantize(z: Tensor, codebook: Tensor, depth: int, metric: str) -> tuple[Tensor, Tensor]:
    """Residual quantization (Lee et al., RQ-VAE, section 3.1; Zeghidour et al., SoundStream, algorithm 1).

    Args:
        z: Vectors [N, D].
        codebook: Shared codebook [K, D], or one per depth [Q, K, D].
        depth: Number of codes per vector, Q.
        metric: `l2`, `cosine` or `dot`. The codebook vectors are subtracted as stored, for every metric.

    Returns:
        Codes [N, Q] int64, and the sum of the chosen vectors [N, D].
    """
    residual, books = z.float(), codebook.float()
    codes, quantized = [], torch.zeros_like(residual)
    for table in books.expand(depth, -1, -1):
        code = scores(residual, table, metric).argmax(-1)
        residual = residual - table[code]
        quantized = quantized + table[code]
        codes.append(code)
    return torch.stack(codes, 1), quantized.to(z.dtype)


@residual_quantize.register_fake
def _(z: Tensor, codebook: Tensor, depth: int, metric: str) -> tuple[Tensor, Tensor]:
    return z.new_empty((z.shape[0], depth), dtype=torch.int64), torch.empty_like(z)


def nearest_on_cuda(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """`nearest` with our Triton kernel."""
    from vqdeploy import kernels

    codes = z.new_empty((z.shape[0],), dtype=torch.int64)
    with torch.cuda.device_of(z):
        kernels.nearest(z.contiguous(), codebook.contiguous(), codes, metric)
    return codes


def residual_quantize_on_cuda(z: Tensor, codebook: Tensor, depth: int, metric: str) -> tuple[Tensor, Tensor]:
    """`residual_quantize` with our Triton kernel."""
    from vqdeploy import kernels

    z = z.contiguous()
    codes, quantized = z.new_empty((z.shape[0], depth), dtype=torch.int64), torch.empty_like(z)
    with torch.cuda.device_of(z):
        kernels.residual_quantize(z, codebook.contiguous(), codes, quantized, metric)
    return codes, quantized


if find_spec("triton"):
    nearest.register_kernel("cuda")(nearest_on_cuda)
    residual_quantize.register_kernel("cuda")(residual_quantize_on_cuda)


@operator("lookup")
def lookup(codes: Tensor, codebook: Tensor) -> Tensor:
    """Sums the vectors of the codes of each row; the code -1 adds nothing.

    Args:
        codes: Codes [N, q] int64, each in -1..K-1.
        codebook: Codebook [K, D], or one per depth [Q, K, D] with q <= Q.

    Returns:
        Vectors [N, D].
    """
    used = (codes >= 0).unsqueeze(-1).to(codebook.dtype)
    safe = codes.clamp(min=0)
    if codebook.ndim == 2:
        return (codebook[safe] * used).sum(1)
    return (codebook[torch.arange(codes.shape[1], device=codes.device), safe] * used).sum(1)


@lookup.register_fake
def _(codes: Tensor, codebook: Tensor) -> Tensor:
    return codebook.new_empty((codes.shape[0], codebook.shape[-1]))


@operator("packed_attention")
def packed_attention(qkv: Tensor, heads: int) -> Tensor:
    """Bidirectional attention.

    Args:
        qkv: Queries (already scaled), keys and values, concatenated [B, S, 3 * H * D].
        heads: Number of heads H.

    Returns:
        Attention output [B, S, H * D].
    """
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, key, value, scale=1.0).transpose(1, 2).flatten(2)


@packed_attention.register_fake
def _(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3))


@operator("scaled_attention")
def scaled_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention of every query to every key.

    Args:
        query: Queries, already scaled [B, S, H * D].
        key: Keys [B, T, H * D].
        value: Values [B, T, H * D].
        heads: Number of heads H.

    Returns:
        Attention output [B, S, H * D].
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2)


@scaled_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    return torch.empty_like(query)


@operator("write_cache")
def write_cache(past: Tensor, entries: Tensor, position: Tensor) -> Tensor:
    """Writes entries into a KV cache; backends may do it in place.

    Args:
        past: Cache [B, H, T, D].
        entries: New entries [B, H, S, D].
        position: Index of the first entry [B] int64; position + S <= T.

    Returns:
        The cache with entries position..position+S-1 written.
    """
    indices = position[:, None] + torch.arange(entries.shape[2], device=past.device)  # [B, S]
    rows = torch.arange(len(past), device=past.device)[:, None]
    present = past.clone()
    present[rows, :, indices] = entries.transpose(1, 2)
    return present


@write_cache.register_fake
def _(past: Tensor, entries: Tensor, position: Tensor) -> Tensor:
    return torch.empty_like(past)


@operator("cached_attention")
def cached_attention(
    qkv: Tensor, past_key: Tensor, past_value: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of S new entries over a static KV cache, after writing their keys and values.

    Args:
        qkv: Queries (already scaled), keys and values, concatenated [B, S, 3 * H * D].
        past_key: Keys [B, H, T, D].
        past_value: Values [B, H, T, D].
        position: Index of the first new entry in the cache [B] int64; position + S <= T.

    Returns:
        Attention output [B, S, H * D], and both caches with entries position..position+S-1 written.
    """
    batch, length, _ = qkv.shape
    heads, capacity = past_key.shape[1:3]
    query, key, value = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    entries = position[:, None] + torch.arange(length, device=qkv.device)  # [B, S]
    keys, values = write_cache(past_key, key, position), write_cache(past_value, value, position)
    seen = torch.arange(capacity, device=qkv.device) <= entries[:, None, :, None]
    scores = (query @ keys.transpose(-1, -2)).masked_fill(~seen, -3e4)
    return (scores.softmax(-1) @ values).transpose(1, 2).reshape(batch, length, -1), keys, values


@cached_attention.register_fake
def _(qkv: Tensor, past_key: Tensor, past_value: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = qkv.shape
    return qkv.new_empty((batch, length, width // 3)), torch.empty_like(past_key), torch.empty_like(past_value)


@operator("quantized_cached_attention")
def quantized_cached_attention(
    qkv: Tensor, past_key: Tensor, past_value: Tensor, position: Tensor, key_scale: Tensor, value_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`cached_attention` over caches in int8.

    Args:
        qkv: Queries (already scaled), keys and values, concatenated [B, S, 3 * H * D].
        past_key: Keys int8 [B, H, T, D].
        past_value: Values int8 [B, H, T, D].
        position: Index of the first new entry in the cache [B] int64; position + S <= T.
        key_scale: What 1 is worth in a key [1, H, 1, D] float32.
        value_scale: What 1 is worth in a value, likewise.

    Returns:
        Attention output [B, S, H * D], and both caches with entries position..position+S-1 written. Keys and values
        beyond 127 times their scale are cut off.
    """
    query, key, value = qkv.unflatten(-1, (3, past_key.shape[1], -1)).permute(2, 0, 3, 1, 4)
    key, value = (
        (new / scale).round().clamp(-128, 127).to(torch.int8) for new, scale in ((key, key_scale), (value, value_scale))
    )
    keys, values = write_cache(past_key, key, position), write_cache(past_value, value, position)
    stored = torch.stack([query, key * key_scale, value * value_scale]).permute(1, 3, 0, 2, 4).flatten(2)
    return cached_attention(stored, keys * key_scale, values * value_scale, position)[0], keys, values


@quantized_cached_attention.register_fake
def _(
    qkv: Tensor, past_key: Tensor, past_value: Tensor, position: Tensor, key_scale: Tensor, value_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = qkv.shape
    return qkv.new_empty((batch, length, width // 3)), torch.empty_like(past_key), torch.empty_like(past_value)


@operator("sample")
def sample(logits: Tensor, noise: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Draws one code per row by the Gumbel-max trick, after temperature, top-k and top-p, in that order.

    Top-k keeps every logit that reaches the k-th largest; top-p keeps a code while the probability of all more likely
    ones is below p. Ties with the last kept code are kept too.

    Args:
        logits: Logits [N, K].
        noise: Standard Gumbel noise [N, K] float32.
        temperature: [N] float32, above 0.
        top_k: [N] int64, in 1..K; K keeps all.
        top_p: [N] float32, in 0..1; 1 keeps all.

    Returns:
        Codes [N] int64.
    """
    return (truncate(logits, temperature, top_k, top_p) + noise).argmax(-1)


@sample.register_fake
def _(logits: Tensor, noise: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


@operator("truncate")
def truncate(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Logits [N, K] / temperature, with -1e30 for codes removed by top-k and top-p; see `sample`."""
    scaled = logits.float() / temperature[:, None]
    if (top_k >= logits.shape[1]).all() and (top_p >= 1).all():
        return scaled
    ordered = scaled.sort(-1, descending=True).values
    kth = ordered.gather(1, top_k[:, None] - 1)
    probabilities = ordered.masked_fill(ordered < kth, -torch.inf).softmax(-1)
    before = F.pad(probabilities.cumsum(-1)[:, :-1], (1, 0))
    kept = (ordered >= kth) & ((before < top_p[:, None]) | (top_p[:, None] >= 1))
    kept[:, 0] = True
    last = ordered.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    return scaled.masked_fill(scaled < last, -1e30)


@truncate.register_fake
def _(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    return torch.empty_like(logits, dtype=torch.float32)
