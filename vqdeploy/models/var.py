"""VAR: a transformer that predicts the code maps of an image scale by scale, each whole map at once.

Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (NeurIPS 2024),
section 3.3 and its public code, whose parameter names it follows. The class conditions the norms (Peebles and Xie,
"Scalable Diffusion Models with Transformers", ICCV 2023).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.config import Config
from vqdeploy.models.modules import Modules
from vqdeploy.models.quantizers import MultiScaleQuantizer
from vqdeploy.models.transformer import Attend, initialize
from vqdeploy.models.var_tokenizer import SIDES

_SHARPEST = math.log(100)  # limit of the logarithm of an attention scale
_GATES = 1e-3  # their weights at the start


@dataclass(frozen=True)
class VARConfig(Config):
    """Shape of the prior.

    `sides` are those of the square code maps, coarse to fine. `classes` is the number of class labels; the label
    `classes` means no label. With `shared_modulation` one layer modulates all blocks, each of which adds an offset.
    """

    sides: tuple[int, ...] = SIDES
    codebook_size: int = 4096
    code_dim: int = 32
    width: int = 1024
    layers: int = 16
    heads: int = 16
    classes: int = 1000
    shared_modulation: bool = False

    @property
    def level_grids(self) -> tuple[tuple[int, ...], ...]:
        """Height and width of each code map, coarse to fine."""
        return tuple((side, side) for side in self.sides)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the codes of one image: all scales concatenated, coarse to fine."""
        return (sum(side**2 for side in self.sides),)

    @property
    def depth(self) -> int:
        """Number of scales, which may differ in their sampling options."""
        return len(self.sides)

    @property
    def null_label(self) -> bool:
        """Whether the label `classes` means no label."""
        return True


class Attention(nn.Module):
    """Multi-head attention of queries and keys of unit length; each head has a scale, stored as its logarithm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be split into {heads} heads")
        self.heads = heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    @property
    def scale(self) -> Tensor:
        """Factor of the queries of each head [1, H, 1, 1]."""
        return self.scale_mul_1H11.clamp(max=_SHARPEST).exp()

    @property
    def bias(self) -> Tensor:
        """Of queries, keys and values [3 * width]; keys have none."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        projected = self.mat_qkv(x) + self.bias
        q, k, v = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attend(F.normalize(q, dim=-1) * self.scale, F.normalize(k, dim=-1), v)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two linear layers with an approximated GELU between them."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """A pre-norm block. `modulation` [B, 6, C] are gates, scales and shifts, of attention and MLP in turn."""

    def __init__(self, config: VARConfig):
        super().__init__()
        width = config.width
        self.attn, self.ffn = Attention(width, config.heads), MLP(width)
        if config.shared_modulation:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = modulating(width, 6)

    def modulation(self, label: Tensor, shared: Tensor | None) -> Tensor:
        """The modulation by embedded labels [B, C]; `shared` [B, 6, C] is what the blocks share, if they do."""
        if shared is not None:
            return shared + self.ada_gss[0]
        own: Tensor = self.ada_lin(label).unflatten(-1, (6, -1))
        return own

    def forward(self, x: Tensor, modulation: Tensor, attend: Attend) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation[:, :, None].unbind(1)
        x = x + self.attn(normalized(x) * (1 + scale1) + shift1, attend) * gate1
        change: Tensor = self.ffn(normalized(x) * (1 + scale2) + shift2) * gate2
        return x + change


class HeadNorm(nn.Module):
    """The norm before the head, scaled and shifted by embedded labels [B, C]."""

    def __init__(self, width: int):
        super().__init__()
        self.ada_lin = modulating(width, 2)

    def modulation(self, label: Tensor) -> Tensor:
        """Embedded labels [B, C] -> scales and shifts [B, 2, C]."""
        both: Tensor = self.ada_lin(label).unflatten(-1, (2, -1))
        return both

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation[:, :, None].unbind(1)
        return normalized(x) * (1 + scale) + shift


class VAR(nn.Module):
    """The prior. Codes are int64 [B, N], see `MultiScaleQuantizer`; labels int64 [B] in 0..classes.

    Each position of a scale takes the map of the coarser scales, averaged to it, and predicts its own code. `quantizer`
    is that of the tokenizer, to which its weights belong.
    """

    scales: Tensor  # [N], the scale of each position
    seen: Tensor  # bool [N, N], what each position attends to

    def __init__(self, config: VARConfig, quantizer: MultiScaleQuantizer):
        super().__init__()
        self.config = config
        width = config.width
        self._quantizer = [quantizer]  # in a list, to keep it out of the state_dict
        self.class_emb = nn.Embedding(config.classes + 1, width)
        self.pos_start = nn.Parameter(torch.zeros(1, config.sides[0] ** 2, width))
        self.word_embed = nn.Linear(config.code_dim, width)
        self.lvl_embed = nn.Embedding(len(config.sides), width)
        self.pos_1LC = nn.Parameter(torch.zeros(1, config.grid[0], width))
        self.shared_ada_lin = modulating(width, 6) if config.shared_modulation else None
        self.blocks = Modules(Block(config) for _ in range(config.layers))
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, config.codebook_size)
        scales = torch.cat([torch.full((side**2,), scale) for scale, side in enumerate(config.sides)])
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("seen", scales[:, None] >= scales, persistent=False)
        self.apply(initialize)
        for embedding in (self.pos_start, self.pos_1LC):
            nn.init.normal_(embedding, std=0.02)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith("ada_gss"):
                    weight[..., :2, :] *= _GATES
                elif name.endswith("ada_lin.1.weight") and "head" not in name:
                    weight[: 2 * width] *= _GATES

    @property
    def quantizer(self) -> MultiScaleQuantizer:
        """The quantizer of the tokenizer."""
        return self._quantizer[0]

    @property
    def places(self) -> Tensor:
        """Embedding of each position, of its scale included [N, width]."""
        return self.lvl_embed.weight[self.scales] + self.pos_1LC[0]

    def modulations(self, labels: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Labels [B] -> their embedding [B, C], the modulation of each block [B, 6, C] and of the head [B, 2, C]."""
        label: Tensor = self.class_emb(labels)
        shared = None if self.shared_ada_lin is None else self.shared_ada_lin(label).unflatten(-1, (6, -1))
        return label, [block.modulation(label, shared) for block in self.blocks], self.head_nm.modulation(label)

    def logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits [B, N, K] of each code given those of coarser scales."""
        return self.logits_at(self.quantizer.inputs(codes), labels)

    def logits_at(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The same from the averaged maps of all scales but the first; see `MultiScaleQuantizer.inputs`."""
        label, modulations, last = self.modulations(labels)
        first = label[:, None] + self.pos_start
        x = torch.cat([first, self.word_embed(inputs)], 1) + self.places
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = block(x, modulation, self._attend)
        logits: Tensor = self.head(self.head_nm(x, last))
        return logits

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, self.seen, scale=1.0)


def modulating(width: int, parts: int) -> nn.Sequential:
    """The layers that make scales, shifts and gates [B, parts * width] of embedded labels [B, width]."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def normalized(x: Tensor) -> Tensor:
    """Layer norm of the last dimension, without weights [..., width]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def blended(kept: Tensor, noise: Tensor, share: Tensor, codebook: Tensor) -> Tensor:
    """Means of codebook vectors instead of drawn ones, `more_smooth` of the public code: smoother, less diverse images.

    Args:
        kept: Logits [N, K] after temperature, top-k and top-p, see `vqdeploy.models.ops.truncate`.
        noise: Standard Gumbel noise [N, K] float32.
        share: How far the scales have come [N], 0 at the first and 1 at the last.
        codebook: Codebook [K, D].

    Returns:
        Vectors [N, D].
    """
    temperature = (0.27 * (1 - 0.95 * share)).clamp(min=0.005)
    logits = (kept * (1 + share)[:, None] + noise) / temperature[:, None]
    return logits.softmax(-1) @ codebook
