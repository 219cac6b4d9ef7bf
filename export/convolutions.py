"""Convolutions of a decoder in int8, between fixed steps of 8 bits for the maps that come in and go out."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.errors import VqdeployError
from vqdeploy.export.rounding import rounded_columns
from vqdeploy.models.vqvae2 import AnyTokenizer

_PIXELS = 2**18  # of the images that activations are observed on
_MOST_IMAGES = 32
_COARSE = 8  # points of smooth images, along each axis


Extent = tuple[float, float]
"""Smallest and largest number."""


class QuantizedConvolution(nn.Module):
    """`nn.Conv2d` of integers: weights of 7 bits, maps of 8."""

    weight: Tensor  # int8 [outputs, inputs, height, width]
    scale: Tensor  # [outputs]
    bias: Tensor  # int32 [outputs]

    def __init__(self, layer: nn.Conv2d, inputs: Extent, outputs: Extent):
        super().__init__()
        (step, zero), (output_step, output_zero) = map(_grid, (inputs, outputs))
        bias = torch.zeros(layer.out_channels) if layer.bias is None else layer.bias.detach()
        # The integer of a bias, with the products added, must fit 32 bits, however small the weights are.
        integers, scale = rounded_columns(layer.weight.detach().flatten(1).T, bias.abs() / (step * 2**30))
        self.register_buffer("weight", integers.T.reshape(layer.weight.shape).contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", (bias.double() / (scale.double() * step)).round().to(torch.int32))
        for name, value in {"step": step, "output_step": output_step}.items():
            self.register_buffer(name, torch.tensor(value))
        for name, value in {"zero": zero, "output_zero": output_zero}.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.uint8))
        self.padding = int(layer.padding[0])

    def forward(self, x: Tensor) -> Tensor:
        steps = self.step, self.zero, self.output_step, self.output_zero
        y: Tensor = torch.ops.vqdeploy.quantized_convolution(
            x, self.weight, self.scale, self.bias, *steps, self.padding
        )
        return y


def _grid(extent: Extent) -> tuple[float, int]:
    """What an integer of 8 bits is worth, and the one that stands for zero, for numbers in a range."""
    low, high = min(extent[0], 0.0), max(extent[1], 0.0)
    step = max(high - low, 1e-30) / 255
    return step, round(-low / step)


def has_convolutions(module: nn.Module) -> bool:
    """Whether a module has convolutions to quantize."""
    return any(_quantizable(module))


def _quantizable(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Conv2d]]:
    """The convolutions of stride 1 within a module, each with its owner and name there."""
    for owner in module.modules():
        for name, part in owner.named_children():
            if type(part) is nn.Conv2d and part.stride == part.dilation == (1, 1) and part.groups == 1:
                yield owner, name, part


def quantize_convolutions(module: nn.Module, codes: Tensor) -> None:
    """Quantizes the convolutions within a decoder, but for the first and the last one, which are little of the work.

    Args:
        module: A module that takes codes.
        codes: Code maps [B, h, w, Q]. The steps of the integers fit the activations that these cause.

    Raises:
        VqdeployError: The activations are not finite.
    """
    found = list(_quantizable(module))
    extents = _extents(module, [layer for *_, layer in found], codes)
    inner = list(extents)[1:-1]
    for owner, name, layer in found:
        if layer in inner:
            owner.register_module(name, QuantizedConvolution(layer, *extents[layer]))


def _extents(module: nn.Module, layers: list[nn.Conv2d], codes: Tensor) -> dict[nn.Conv2d, tuple[Extent, Extent]]:
    """The extents of what goes into and comes out of layers, in the order in which the layers are called."""
    extents: dict[nn.Conv2d, tuple[Extent, Extent]] = {}

    def observe(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)  # noqa: S101
        new = _extent(inputs[0]), _extent(output)
        known = extents.get(layer, new)
        extents[layer] = _joined(known[0], new[0]), _joined(known[1], new[1])

    hooks = [layer.register_forward_hook(observe) for layer in layers]
    with torch.no_grad():
        for one in codes.split(1):
            module(one)
    for hook in hooks:
        hook.remove()
    return extents


def _extent(x: Tensor) -> Extent:
    low, high = map(float, x.aminmax())
    if not math.isfinite(low + high):
        raise VqdeployError("the activations of a decoder are not finite, and have no scale in int8")
    return low, high


def _joined(a: Extent, b: Extent) -> Extent:
    return min(a[0], b[0]), max(a[1], b[1])


@torch.no_grad()
def calibration_codes(tokenizer: AnyTokenizer, size: tuple[int, int]) -> Tensor:
    """Code maps to observe a decoder on, [B, h, w, Q]: random ones, and those of smooth random images.

    Together they cover what codes of any image cause. Codes of the user's images would lead to finer steps, but what
    lies beyond them would be cut off.
    """
    generator = torch.Generator().manual_seed(0)
    images = min(_MOST_IMAGES, max(2, _PIXELS // (size[0] * size[1])))
    low, high = tokenizer.config.pixel_range
    coarse = torch.rand(images, 3, _COARSE, _COARSE, generator=generator)
    smooth = F.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * (high - low) + low
    codes = torch.cat([tokenizer.encode(image) for image in smooth.split(1)])
    return torch.cat([codes, torch.randint(tokenizer.config.codebook_size, codes.shape, generator=generator)])
