"""The stages of a tokenizer: `encode` and `decode`."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vqdeploy.errors import VqdeployError
from vqdeploy.export.convolutions import calibration_codes
from vqdeploy.export.layers import ImageInput, ImageOutput, Modulation, PackedAttention, SplitUpsample
from vqdeploy.export.stage import Stage
from vqdeploy.models import vitvqgan
from vqdeploy.models.conv import SpatialNorm, Upsample
from vqdeploy.models.var_tokenizer import MultiScaleTokenizer
from vqdeploy.models.vqvae2 import AnyTokenizer

_FASTER: dict[type, Any] = {Upsample: SplitUpsample, SpatialNorm: Modulation, vitvqgan.Attention: PackedAttention}


def _laid_out(tokenizer: AnyTokenizer) -> AnyTokenizer:
    """A copy of a tokenizer with layers for inference."""
    tokenizer = copy.deepcopy(tokenizer)
    for module in list(tokenizer.modules()):
        for name, child in module.named_children():
            if type(child) in _FASTER:
                setattr(module, name, _FASTER[type(child)](child))
    return tokenizer


class Encode(nn.Module):
    """Image uint8 [B, H, W, 3] -> codes int64 [B, h, w, Q]."""

    def __init__(self, tokenizer: AnyTokenizer):
        super().__init__()
        self.input = ImageInput(tokenizer.config.pixel_range)
        self.tokenizer = _laid_out(tokenizer)

    def forward(self, image: Tensor) -> Tensor:
        codes: Tensor = self.tokenizer.encode(self.input(image))
        return codes


class Decode(nn.Module):
    """Codes int64 [B, h, w, Q], -1 for a residual depth to skip -> image uint8 [B, H, W, 3]."""

    def __init__(self, tokenizer: AnyTokenizer):
        super().__init__()
        self.output = ImageOutput(tokenizer.config.pixel_range)
        self.tokenizer = _laid_out(tokenizer)

    def forward(self, codes: Tensor) -> Tensor:
        image: Tensor = self.output(self.tokenizer.decode(codes))
        return image


class Reconstruct(nn.Module):
    """The sum of all scales [B, h * w, D] -> image uint8 [B, H, W, 3], for a sum that is not one of codes."""

    def __init__(self, tokenizer: MultiScaleTokenizer):
        super().__init__()
        self.output = ImageOutput(tokenizer.config.pixel_range)
        self.tokenizer: Any = _laid_out(tokenizer)
        self.side = tokenizer.config.sides[-1]

    def forward(self, whole_map: Tensor) -> Tensor:
        image: Tensor = self.output(self.tokenizer.reconstruct(whole_map.unflatten(1, (self.side, -1))))
        return image


def maps_of(tokenizer: AnyTokenizer, size: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """Height, width and depth of each code map, for images of the given size.

    Raises:
        VqdeployError: The tokenizer does not take images of that size.
    """
    side = tokenizer.config.resolution
    if size == (side, side):
        return tuple(tokenizer.maps)
    if not tokenizer.any_size:
        raise VqdeployError("this tokenizer takes images of one size", expected=f"{side}x{side}", found=_shown(size))
    factors = [side // height for height, *_ in tokenizer.maps]
    if any(length < factor or length % factor for length in size for factor in factors):
        expected = f"a height and a width that {max(factors)} divides"
        raise VqdeployError("this tokenizer does not take images of that size", expected=expected, found=_shown(size))
    return tuple(
        (size[0] // factor, size[1] // factor, depth)
        for factor, (_, _, depth) in zip(factors, tokenizer.maps, strict=True)
    )


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def stages(tokenizer: AnyTokenizer, size: tuple[int, int] | None = None) -> list[Stage]:
    """The stages of a tokenizer, for images of a height and width; by default those of its configuration."""
    height, width = size or (tokenizer.config.resolution,) * 2
    maps = maps_of(tokenizer, (height, width))
    image = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    codes = torch.zeros(2, *(maps[0] if len(maps) == 1 else tokenizer.config.grid), dtype=torch.int64)
    stages = [
        Stage("encode", Encode(tokenizer), {"image": image}, ["codes"]),
        Stage(
            "decode",
            Decode(tokenizer),
            {"codes": codes},
            ["image"],
            calibration=lambda: calibration_codes(tokenizer, (height, width)),
        ),
    ]
    if isinstance(tokenizer, MultiScaleTokenizer):
        quantizer = tokenizer.quantizer
        cells, dim = maps[-1][0] ** 2, tokenizer.config.code_dim
        stages.append(
            Stage(
                "reconstruct",
                Reconstruct(tokenizer),
                {"whole_map": torch.zeros(2, cells, dim)},
                ["image"],
                calibration=lambda: quantizer.sums(calibration_codes(tokenizer, (height, width)))[-1],
            )
        )
    return stages
