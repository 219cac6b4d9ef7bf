"""The stages of a tokenizer: `encode` and `decode`."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vqdeploy.export.layers import ImageInput, ImageOutput, Modulation, PackedAttention, SplitUpsample
from vqdeploy.export.stage import Stage
from vqdeploy.models import vitvqgan
from vqdeploy.models.conv import SpatialNorm, Upsample

_FASTER: dict[type, Any] = {Upsample: SplitUpsample, SpatialNorm: Modulation, vitvqgan.Attention: PackedAttention}


def _laid_out(tokenizer: Any) -> Any:
    """A copy of a tokenizer with layers that are laid out for inference."""
    tokenizer = copy.deepcopy(tokenizer)
    for module in list(tokenizer.modules()):
        for name, child in module.named_children():
            if type(child) in _FASTER:
                setattr(module, name, _FASTER[type(child)](child))
    return tokenizer


class Encode(nn.Module):
    """Image uint8 [B, H, W, 3] -> codes int64 [B, h, w, Q]."""

    def __init__(self, tokenizer: Any):
        super().__init__()
        self.input = ImageInput(tokenizer.config.pixel_range)
        self.tokenizer = _laid_out(tokenizer)

    def forward(self, image: Tensor) -> Tensor:
        return self.tokenizer.encode(self.input(image))


class Decode(nn.Module):
    """Codes int64 [B, h, w, Q], -1 for a residual depth to leave out -> image uint8 [B, H, W, 3]."""

    def __init__(self, tokenizer: Any):
        super().__init__()
        self.output = ImageOutput(tokenizer.config.pixel_range)
        self.tokenizer = _laid_out(tokenizer)

    def forward(self, codes: Tensor) -> Tensor:
        return self.output(self.tokenizer.decode(codes))


def stages(tokenizer: Any) -> list[Stage]:
    """Both graphs of a tokenizer."""
    side = tokenizer.config.resolution
    image = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    codes = torch.zeros(2, *tokenizer.config.grid, dtype=torch.int64)
    return [
        Stage("encode", Encode(tokenizer), {"image": image}, ["codes"]),
        Stage("decode", Decode(tokenizer), {"codes": codes}, ["image"]),
    ]
