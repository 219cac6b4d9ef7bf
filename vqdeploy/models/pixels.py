"""Pixels of image files and pixels of models: the one definition that training, `verify` and tests share.

`vqdeploy.export.layers` writes the same into graphs by itself, so that what `verify` compares comes from two sources.
"""

from torch import Tensor, uint8


def channels_first(images: Tensor) -> Tensor:
    """Images [..., H, W, 3], as files and plans hold them -> [..., 3, H, W], as models take them."""
    return images.movedim(-1, -3)


def channels_last(images: Tensor) -> Tensor:
    """Images [..., 3, H, W] -> [..., H, W, 3]."""
    return images.movedim(-3, -1)


def to_range(images: Tensor, pixel_range: tuple[float, ...]) -> Tensor:
    """Images uint8 -> fp32 in the range of a model: 0 becomes its lower end, 255 its upper end."""
    low, high = pixel_range
    return images.float() / 255 * (high - low) + low


def to_uint8(images: Tensor, pixel_range: tuple[float, ...]) -> Tensor:
    """Images in the range of a model -> uint8, rounded; what lies outside the range is cut off."""
    low, high = pixel_range
    return ((images.float() - low) / (high - low) * 255).round().clamp(0, 255).to(uint8)
