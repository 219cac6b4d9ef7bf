"""MoVQ: VQGAN with multichannel codes, and a decoder whose norms are modulated by the code vectors.

Zheng et al., "MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation" (NeurIPS 2022). With one group of
channels it is the published MoVQGAN; without modulation as well it is VQGAN: Esser et al., "Taming Transformers for
High-Resolution Image Synthesis" (CVPR 2021).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from vqdeploy.config import Config
from vqdeploy.models.conv import ConvConfig, Decoder, Encoder
from vqdeploy.models.quantizers import GumbelQuantizer, MultichannelQuantizer
from vqdeploy.models.tokenizer import ConvTokenizer


@dataclass(frozen=True)
class MoVQConfig(Config):
    """Shape of the tokenizer.

    The `code_dim` channels are split into `groups` of equal width with one code each. `metric` is `l2` or `cosine`.
    With `gumbel` a linear layer scores the codes instead of a distance; see `GumbelQuantizer`. `pixel_range` is the
    range of the images inside the model.
    """

    conv: ConvConfig = ConvConfig()
    codebook_size: int = 1024
    code_dim: int = 256
    groups: int = 4
    modulation: bool = True
    metric: str = "l2"
    gumbel: bool = False
    decay: float = 0.99
    commitment_weight: float = 0.25
    pixel_range: tuple[float, ...] = (-1.0, 1.0)

    @property
    def resolution(self) -> int:
        """Side of the image in pixels."""
        return self.conv.resolution

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the codes of one image."""
        return (self.conv.grid, self.conv.grid, self.groups)


class MoVQ(ConvTokenizer):
    """The tokenizer. Images are float [B, 3, H, W] in `pixel_range`, codes int64 [B, h, w, Q]."""

    any_size = True

    config: MoVQConfig

    def __init__(self, config: MoVQConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.conv)
        self.decoder = Decoder(config.conv, config.code_dim if config.modulation else 0)
        self.quant_conv = nn.Conv2d(config.conv.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.conv.latent_channels, 1)
        size, dim = config.codebook_size, config.code_dim
        self.quantizer = (
            GumbelQuantizer(size, dim)
            if config.gumbel
            else MultichannelQuantizer(size, dim, config.groups, config.metric, config.decay)
        )

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Vectors [B, h, w, D], which also condition the norms, before `post_quant_conv` -> images [B, 3, H, W]."""
        condition = vectors.permute(0, 3, 1, 2)
        image: Tensor = self.decoder(self.post_quant_conv(condition), condition)
        return image
