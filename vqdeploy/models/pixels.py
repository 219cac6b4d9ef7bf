"""Conversion between uint8 images and model inputs, shared by training, `verify` and tests.

`vqdeploy.export.layers` has its own implementation for graphs, so that `verify` compares independent code.
"""

from torch import Tensor, uint8


def channels_first(images: Tensor) -> Tensor:
    """Images [..., H, W, 3] of files and plans -> [..., 3, H, W] of models."""
    return images.movedim(-1, -3)


def channels_last(images: Tensor) -> Tensor:
    """Images [..., 3, H, W] -> [..., H, W, 3]."""
    return images.movedim(-3, -1)


def to_range(images: Tensor, pixel_range: tuple[float, ...]) -> Tensor:
    """Images uint8 [...] -> float32 [...] in the range of a model: 0 becomes its lower end, 255 its upper end."""
    low, high = pixel_range
    return images.float() / 255 * (high - low) + low


def to_uint8(images: Tensor, pixel_range: tuple[float, ...]) -> Tensor:
    """Images float [...] in the range of a model -> uint8 [...], clipped and rounded."""
    low, high = pixel_range
    return ((images.float() - low) / (high - low) * 255).round().clamp(0, 255).to(uint8)
