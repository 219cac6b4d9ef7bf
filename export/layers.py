"""Layers for inference, made from trained ones: the same function in a form that exports and runs better."""

from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.models import vitvqgan
from vqdeploy.models.conv import SpatialNorm, Upsample
from vqdeploy.models.ops import windows
from vqdeploy.models.transformer import Attention, Block


def widened(x: Tensor) -> Tensor:
    """Casts fp16 to fp32; other types stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Product(nn.Module):
    """A matrix product, which `vqdeploy.export.precision` may quantize to `least_bits` or more.

    `moment` [inputs, inputs] is what is known of its inputs, see `vqdeploy.export.rounding.observed`.
    """

    weight: Tensor  # [inputs, outputs]
    least_bits: int = 4

    def __init__(self, weight: Tensor, moment: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight.detach().contiguous())
        self.moment = moment

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class RowProduct(Product):
    """A convolution along a row [B, w, inputs] as a product with windows of it; `kernel` is [taps, inputs, outputs]."""

    def __init__(self, kernel: Tensor):
        super().__init__(kernel.flatten(0, 1))
        self.taps = len(kernel)

    def forward(self, x: Tensor) -> Tensor:
        return windows(x, self.taps) @ self.weight


M = TypeVar("M", bound=nn.Module)


def at_least(bits: int, module: M) -> M:
    """Keeps all products of a module, which are sensitive to quantization, at this many bits."""
    for part in module.modules():
        if isinstance(part, Product):
            part.least_bits = bits
    return module


class Projection(nn.Module):
    """One or more linear layers, concatenated."""

    bias: Tensor  # [outputs]

    def __init__(self, *layers: nn.Linear, scales: tuple[float, ...] = ()):
        super().__init__()
        scales = scales or (1.0,) * len(layers)
        weight = torch.cat([layer.weight.T * scale for layer, scale in zip(layers, scales, strict=True)], 1)
        biases = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        bias = torch.cat([bias * scale for bias, scale in zip(biases, scales, strict=True)])
        self.product = Product(weight, getattr(layers[0], "moment", None))
        self.register_buffer("bias", bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.product(x) + self.bias
        return projected


class CachedAttention(nn.Module):
    """`cached_attention`, which `vqdeploy.export.precision` may give caches in int8.

    `largest` has the largest key and the largest value of each head [2, H], None if not observed.
    """

    def __init__(self, largest: Tensor | None = None):
        super().__init__()
        self.largest = largest

    def forward(self, qkv: Tensor, key: Tensor, value: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.vqdeploy.cached_attention(qkv, key, value, position)
        return result


def attend_to_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`bidirectional` attention as MatMul and Softmax: TensorRT-RTX supports the Attention operator for few shapes."""
    scale: float = query.shape[-1] ** -0.5
    return (query * scale @ key.transpose(-1, -2)).softmax(-1) @ value


class InferenceBlock(nn.Module):
    """A transformer block with one projection for queries, keys and values, and the scale folded into the queries."""

    def __init__(self, block: Block):
        super().__init__()
        attention = block.attn
        self.heads = attention.heads
        scale = (attention.query.in_features // self.heads) ** -0.5
        self.norm1, self.norm2 = block.ln1, block.ln2
        self.qkv = Projection(attention.query, attention.key, attention.value, scales=(scale, 1.0, 1.0))
        self.proj = Projection(attention.proj)
        self.mlp_in, self.mlp_out = (Projection(layer) for layer in block.mlp if isinstance(layer, nn.Linear))
        self.activation = block.mlp[1]
        self.time_mix: Any = getattr(attention, "time_mix", None)
        self.attend = CachedAttention(_largest(attention))

    def finish(self, x: Tensor, attention: Tensor) -> Tensor:
        """The part after the attention output [B, S, width]."""
        x = x + self.proj(attention)
        change: Tensor = self.mlp_out(self.activation(self.mlp_in(self.norm2(x))))
        return x + change

    def cached(self, x: Tensor, key: Tensor, value: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entries [B, S, width] at `position` [B], with KV caches [B, H, T, D] as inputs and outputs."""
        attention, key, value = self.attend(self.qkv(self.norm1(x)), key, value, position)
        return self.finish(x, attention), key, value

    def shifted(
        self, x: Tensor, key: Tensor, value: Tensor, position: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`cached` with a token shift; `before` [B, 1, width] is the last normalized entry of the call before.

        Also returns the last normalized entry of this call.
        """
        entries = self.norm1(x)
        mixed = torch.lerp(torch.cat([before, entries[:, :-1]], 1), entries, self.time_mix)
        attention, key, value = self.attend(self.qkv(mixed), key, value, position)
        return self.finish(x, attention), key, value, entries[:, -1:]

    def in_order(self, x: Tensor) -> Tensor:
        """Causal attention of all entries [B, S, width], without a cache."""
        entries = self.norm1(x)
        if self.time_mix is not None:
            entries = torch.lerp(F.pad(entries, (0, 0, 1, -1)), entries, self.time_mix)
        query, key, value = self.qkv(entries).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (query @ key.transpose(-1, -2)).masked_fill(later, -3e4)
        return self.finish(x, (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))

    def whole(self, x: Tensor) -> Tensor:
        """Bidirectional attention of all entries [B, S, width]."""
        return self.finish(x, torch.ops.vqdeploy.packed_attention(self.qkv(self.norm1(x)), self.heads))

    def append(self, x: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """One entry [B, 1, width] after the previous ones; appends its key and value [B, H, 1, D] to the lists."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        keys.append(key)
        values.append(value)
        if len(keys) == 1:
            attention = value  # the softmax over one key is 1
        else:
            scores = query @ torch.cat(keys, 2).transpose(-1, -2)
            attention = scores.softmax(-1) @ torch.cat(values, 2)
        return self.finish(x, attention.transpose(1, 2).flatten(2))


def _largest(attention: Attention) -> Tensor | None:
    """The largest key and value of each head [2, H], if `vqdeploy.export.rounding.observed` has seen them."""
    layers = (attention.key, attention.value)
    if not hasattr(attention.key, "largest"):
        return None
    return torch.stack([cast(Tensor, layer.largest).unflatten(0, (attention.heads, -1)).amax(-1) for layer in layers])


def embed_entries(
    codes: Tensor, condition: Tensor, entry: Tensor, table: Tensor, places: Tensor, length: int = 1
) -> Tensor:
    """Entries of a transformer [B, S, width]: the condition, then the codes of each position.

    Args:
        codes: Codes of the entries [B, S, Q]; those of the condition are ignored.
        condition: Embedding of the condition at each entry [B, S, width], or [B, 1, width] for all.
        entry: Index of each entry [B, S]; entry length + t has the codes of position t.
        table: Embedding of each code [K, width]; the depths of a position are summed.
        places: Embedding of each position [h * w, width].
        length: Entries of the condition.
    """
    x = F.embedding(codes, table).sum(2) + F.embedding((entry - length).clamp(min=0), places)
    return torch.where((entry < length)[:, :, None], condition, x)


class PackedAttention(nn.Module):
    """Attention of a ViT as one node, the scale folded into the queries."""

    def __init__(self, attention: vitvqgan.Attention):
        super().__init__()
        self.heads = attention.heads
        scale = torch.ones_like(attention.to_qkv.weight[:, :1])
        scale[: len(scale) // 3] = (len(scale) // 3 // self.heads) ** -0.5
        self.to_qkv = Product((attention.to_qkv.weight * scale).T)
        self.to_out = Projection(attention.to_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.to_out(torch.ops.vqdeploy.packed_attention(self.to_qkv(x), self.heads))
        return out


class SplitUpsample(nn.Module):
    """`Upsample` in 4/9 of its multiplications: four 2x2 convolutions of the small map, interleaved.

    Two of the three taps of a kernel row always fall on the same pixel of the small map, and are added in advance.
    Output pixel (2i + a, 2j + b) comes from convolution 2a + b.
    """

    def __init__(self, upsample: Upsample):
        super().__init__()
        kernels = [columns for rows in _merge(upsample.conv.weight, 2) for columns in _merge(rows, 3)]
        self.convs = nn.ModuleList(_convolution(kernel, upsample.conv.bias) for kernel in kernels)

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for i, conv in enumerate(self.convs):
            down, right = divmod(i, 2)
            parts.append(conv(F.pad(x, (1 - right, right, 1 - down, down))))
        return F.pixel_shuffle(torch.stack(parts, 2).flatten(1, 2), 2)


def _convolution(kernel: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A layer with a kernel [outputs, inputs, height, width], without padding."""
    outputs, inputs, height, width = kernel.shape
    layer = nn.Conv2d(inputs, outputs, (height, width), bias=False)
    layer.weight = nn.Parameter(kernel)
    layer.bias = None if bias is None else nn.Parameter(bias.detach())
    return layer


def _merge(kernel: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Three taps along an axis -> the two taps for even output pixels and the two for odd ones."""
    first, middle, last = kernel.detach().unbind(axis)
    return torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)


class Modulation(nn.Module):
    """`SpatialNorm` with GroupNorm's own scale and shift folded into one convolution of the small map.

    The maps of scales and shifts are upsampled along the width only; each row is broadcast to the rows of its block.
    """

    def __init__(self, norm: SpatialNorm):
        super().__init__()
        self.groups, self.eps = norm.norm_layer.num_groups, norm.norm_layer.eps
        (scale, shift), (weight_y, bias_y), (weight_b, bias_b) = (
            layer.parameters() for layer in (norm.norm_layer, norm.conv_y, norm.conv_b)
        )
        weights = scale[:, None, None, None] * weight_y, shift[:, None, None, None] * weight_y + weight_b
        self.weight = nn.Parameter(torch.cat(weights).detach())
        self.bias = nn.Parameter(torch.cat([scale * bias_y, shift * bias_y + bias_b]).detach())

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        rows, times = condition.shape[-2], x.shape[-1] // condition.shape[-1]
        maps = F.conv2d(condition, self.weight, self.bias)
        if times > 1:
            maps = F.interpolate(maps, scale_factor=(1.0, float(times)))
        scale, shift = maps.unsqueeze(3).chunk(2, 1)  # [B, C, h, 1, W]
        groups = x.unflatten(1, (self.groups, -1)).flatten(2)
        # The operator accumulates in the type of its input.
        normal = F.instance_norm(widened(groups), eps=self.eps).view_as(x).to(x.dtype)
        modulated: Tensor = normal.unflatten(2, (rows, times)) * scale + shift
        return modulated.flatten(2, 3)


class ImageInput(nn.Module):
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in the model's pixel range. The cast comes first, see `ImageOutput`."""

    def __init__(self, pixel_range: tuple[float, ...]):
        super().__init__()
        self.low, self.high = pixel_range

    def forward(self, image: Tensor) -> Tensor:
        return image.float().permute(0, 3, 1, 2) * ((self.high - self.low) / 255) + self.low


class ImageOutput(nn.Module):
    """float [B, 3, H, W] -> uint8 [B, H, W, 3]. The cast comes last: TensorRT supports uint8 only there."""

    def __init__(self, pixel_range: tuple[float, ...]):
        super().__init__()
        self.low, self.high = pixel_range

    def forward(self, x: Tensor) -> Tensor:
        grey = (widened(x) - self.low) * (255 / (self.high - self.low))
        return grey.clamp(0, 255).round().permute(0, 2, 3, 1).to(torch.uint8)
