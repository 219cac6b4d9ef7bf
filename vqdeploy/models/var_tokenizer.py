"""The tokenizer of VAR: a convolutional autoencoder whose latent map is a sum of codes at several scales.

Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (NeurIPS 2024),
section 3.2.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from vqdeploy.config import Config
from vqdeploy.models.conv import ConvConfig, Decoder, Encoder
from vqdeploy.models.quantizers import MultiScaleQuantizer
from vqdeploy.models.tokenizer import ConvTokenizer

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""Sides of the code maps for images of 256 pixels."""


@dataclass(frozen=True)
class MultiScaleConfig(Config):
    """Shape of the tokenizer.

    `sides` are those of the square code maps, coarse to fine; the last is that of the latent map. `pixel_range` is the
    range of the images inside the model.
    """

    conv: ConvConfig = ConvConfig(channels=160, latent_channels=32)
    sides: tuple[int, ...] = SIDES
    codebook_size: int = 4096
    decay: float = 0.99
    commitment_weight: float = 0.25
    pixel_range: tuple[float, ...] = (-1.0, 1.0)

    @property
    def resolution(self) -> int:
        """Side of the image in pixels."""
        return self.conv.resolution

    @property
    def code_dim(self) -> int:
        """Size of a code vector."""
        return self.conv.latent_channels

    @property
    def level_grids(self) -> tuple[tuple[int, ...], ...]:
        """Height and width of each code map, coarse to fine."""
        return tuple((side, side) for side in self.sides)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the codes of one image: all scales concatenated, coarse to fine."""
        return (sum(side**2 for side in self.sides),)


class MultiScaleTokenizer(ConvTokenizer):
    """The tokenizer. Images are float [B, 3, H, W] in `pixel_range`, codes int64 [B, N], see `MultiScaleQuantizer`."""

    omits_depths = True

    config: MultiScaleConfig
    quantizer: MultiScaleQuantizer

    def __init__(self, config: MultiScaleConfig):
        super().__init__()
        conv, sides = config.conv, config.sides
        if not sides or list(sides) != sorted({*sides}) or sides[0] < 1 or sides[-1] != conv.grid:
            raise ValueError(f"code maps of sides {sides} do not rise to {conv.grid}, that of the latent map")
        self.config = config
        self.encoder = Encoder(conv)
        self.decoder = Decoder(conv)
        self.quant_conv = nn.Conv2d(conv.latent_channels, conv.latent_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(conv.latent_channels, conv.latent_channels, 3, padding=1)
        self.quantizer = MultiScaleQuantizer(config.codebook_size, conv.latent_channels, sides, config.decay)

    @property
    def maps(self) -> tuple[tuple[int, ...], ...]:
        """Height, width and depth of each code map, coarse to fine."""
        return tuple((side, side, 1) for side in self.config.sides)

    def depths(self, codes: Tensor) -> tuple[Tensor, ...]:
        """Codes int64 [B, N] -> the codes of each scale [B, p * p]."""
        scales: tuple[Tensor, ...] = codes.split(self.quantizer.sizes, 1)
        return scales
