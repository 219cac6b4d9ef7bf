"""ViT-VQGAN: a transformer autoencoder over patches, with low-dimensional codes on the unit sphere.

Yu et al., "Vector-quantized Image Modeling with Improved VQGAN" (ICLR 2022), section 3. Layers and parameter names
follow thuanz123/enhancing-transformers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqdeploy.config import Config
from vqdeploy.models.modules import Modules
from vqdeploy.models.quantizers import MultichannelQuantizer
from vqdeploy.models.tokenizer import Tokenizer
from vqdeploy.models.transformer import bidirectional

HEAD_DIM = 64
"""Channels per head, for every width."""


@dataclass(frozen=True)
class ViTConfig(Config):
    """Shape of the encoder or the decoder. Each head has 64 channels, for every width."""

    width: int = 512
    layers: int = 8
    heads: int = 8
    mlp_width: int = 2048


@dataclass(frozen=True)
class ViTVQGANConfig(Config):
    """Shape of the tokenizer; `pixel_range` is the range of the images inside the model."""

    resolution: int = 256
    patch: int = 8
    encoder: ViTConfig = ViTConfig()
    decoder: ViTConfig = ViTConfig()
    codebook_size: int = 8192
    code_dim: int = 32
    decay: float = 0.99
    commitment_weight: float = 0.25
    pixel_range: tuple[float, ...] = (0.0, 1.0)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the codes of one image."""
        side = self.resolution // self.patch
        return (side, side, 1)


class Attention(nn.Module):
    """Bidirectional multi-head attention, whose input projection has no bias."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.heads = config.heads
        self.to_qkv = nn.Linear(config.width, 3 * HEAD_DIM * config.heads, bias=False)
        self.to_out = nn.Linear(HEAD_DIM * config.heads, config.width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.to_out(bidirectional(query, key, value).transpose(1, 2).flatten(2))
        return mixed


class FeedForward(nn.Module):
    """Two linear layers with tanh between."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(config.width, config.mlp_width), nn.Tanh(), nn.Linear(config.mlp_width, config.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class PreNorm(nn.Module):
    """x + layer(norm(x))."""

    def __init__(self, width: int, layer: nn.Module):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), layer

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.fn(self.norm(x))
        return x + change


class ViT(nn.Module):
    """Blocks of attention and feed-forward, and a last norm, on [B, N, width]."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.layers = Modules(
            Modules(PreNorm(config.width, layer(config)) for layer in (Attention, FeedForward))
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            for layer in block:
                x = layer(x)
        out: Tensor = self.norm(x)
        return out


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> [B, h * w, width]."""

    def __init__(self, config: ViTVQGANConfig):
        super().__init__()
        width = config.encoder.width
        self.to_patch_embedding = nn.Sequential(nn.Conv2d(3, width, config.patch, stride=config.patch), nn.Flatten(2))
        self.en_pos_embedding = nn.Parameter(positions(config.grid[0], width), requires_grad=False)
        self.transformer = ViT(config.encoder)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.to_patch_embedding(x)
        entries: Tensor = self.transformer(patches.transpose(1, 2) + self.en_pos_embedding)
        return entries


class Decoder(nn.Module):
    """[B, h * w, width] -> image [B, 3, H, W]."""

    def __init__(self, config: ViTVQGANConfig):
        super().__init__()
        width, side = config.decoder.width, config.grid[0]
        self.de_pos_embedding = nn.Parameter(positions(side, width), requires_grad=False)
        self.transformer = ViT(config.decoder)
        enlarge = nn.ConvTranspose2d(width, 3, config.patch, stride=config.patch)
        self.to_pixel = nn.Sequential(nn.Unflatten(2, (side, side)), enlarge)

    def forward(self, x: Tensor) -> Tensor:
        entries: Tensor = self.transformer(x + self.de_pos_embedding)
        image: Tensor = self.to_pixel(entries.transpose(1, 2))
        return image


def positions(side: int, width: int) -> Tensor:
    """2-d sine-cosine embeddings [1, N, width]: the column in the first half of the channels, the row in the second."""
    frequencies = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    columns, rows = line.expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], 2).view(1, side * side, width)


class ViTVQGAN(Tokenizer):
    """The tokenizer. Images are float [B, 3, H, W] in `pixel_range`, codes int64 [B, h, w, 1]."""

    config: ViTVQGANConfig

    def __init__(self, config: ViTVQGANConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.pre_quant = nn.Linear(config.encoder.width, config.code_dim)
        self.post_quant = nn.Linear(config.code_dim, config.decoder.width)
        self.quantizer = MultichannelQuantizer(config.codebook_size, config.code_dim, 1, "cosine", config.decay)

    @property
    def last_weight(self) -> Tensor:
        """Weight of the output layer."""
        return self.decoder.to_pixel[-1].get_parameter("weight")

    def latents(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> vectors before quantization [B, h, w, D], not normalized."""
        vectors: Tensor = self.pre_quant(self.encoder(x))
        latents: Tensor = vectors.unflatten(1, self.config.grid[:2])
        return latents

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Unit vectors [B, h, w, D] -> images [B, 3, H, W]."""
        image: Tensor = self.decoder(self.post_quant(vectors.flatten(1, 2)))
        return image
