"""Vector quantizers: a codebook, codes from vectors, vectors from codes, and how the codebook learns."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.models.ops import lookup, nearest, residual_quantize


class Quantized(NamedTuple):
    """What a quantizer makes of vectors while training."""

    vectors: Tensor  # straight-through estimate [..., D]
    codes: Tensor  # int64 [..., Q]
    commitment_loss: Tensor  # scalar


class AveragedCodebook(nn.Module):
    """A codebook that is learned by moving averages.

    Van den Oord et al., "Neural Discrete Representation Learning" (NeurIPS 2017), appendix A.1. A code that the moving
    average no longer counts once a step is restarted from a vector of the batch.
    """

    codebook: Tensor  # [K, D]
    cluster_size_ema: Tensor  # [K]
    embed_ema: Tensor  # [K, D]

    def __init__(self, codebook_size: int, dim: int, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("codebook", torch.randn(codebook_size, dim) / codebook_size**0.5)
        self.register_buffer("cluster_size_ema", torch.ones(codebook_size))
        self.register_buffer("embed_ema", self.codebook.clone())

    @torch.no_grad()
    def _update(self, vectors: Tensor, codes: Tensor, epsilon: float = 1e-5) -> None:
        size = len(self.codebook)
        counts = torch.bincount(codes, minlength=size).to(vectors)
        sums = torch.zeros_like(self.embed_ema).index_add_(0, codes, vectors)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        self.cluster_size_ema.lerp_(counts, 1 - self.decay)
        self.embed_ema.lerp_(sums, 1 - self.decay)

        unused = self.cluster_size_ema < 1
        self.embed_ema[unused] = _draw(vectors, size)[unused]
        self.cluster_size_ema[unused] = 1
        total = self.cluster_size_ema.sum()
        smoothed = total * (self.cluster_size_ema + epsilon) / (total + size * epsilon)
        self.codebook.copy_(self.embed_ema / smoothed[:, None])


class ResidualQuantizer(AveragedCodebook):
    """Residual quantization with one codebook shared by all depths.

    Lee et al., "Autoregressive Image Generation using Residual Quantization" (CVPR 2022), section 3.1.
    """

    def __init__(self, codebook_size: int, dim: int, depth: int, decay: float = 0.99):
        super().__init__(codebook_size, dim, decay)
        self.depth = depth

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [..., D] -> codes int64 [..., Q] and their sum [..., D]."""
        codes, quantized = residual_quantize(z.flatten(0, -2), self.codebook, self.depth, "l2")
        return codes.view(*z.shape[:-1], self.depth), quantized.view_as(z)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [..., Q], -1 for none -> vectors [..., D]."""
        return lookup(codes.flatten(0, -2), self.codebook).view(*codes.shape[:-1], -1)

    def distances(self, z: Tensor, codes: Tensor) -> Tensor:
        """Squared distances [..., Q, K] between what the codes before leave of vectors [..., D] and the codebook."""
        residual, distances = z.flatten(0, -2), []
        for code in codes.flatten(0, -2).unbind(-1):
            distances.append(torch.cdist(residual, self.codebook).square())
            residual = residual - self.codebook[code]
        return torch.stack(distances, 1).view(*codes.shape, -1)

    def soft_codes(self, z: Tensor, temperature: float, stochastic: bool = True) -> tuple[Tensor, Tensor]:
        """Targets for the prior (section 3.3): at each depth the softmax of minus the squared distances.

        Args:
            z: Vectors [..., D].
            temperature: Divides the squared distances, above 0.
            stochastic: Draw each code from its softmax, and let the residual follow the draw.

        Returns:
            Codes int64 [..., Q] and probabilities [..., Q, K].
        """
        residual = z.flatten(0, -2)
        codes, targets = [], []
        for _ in range(self.depth):
            target = (-torch.cdist(residual, self.codebook).square() / temperature).softmax(-1)
            code = target.multinomial(1).squeeze(1) if stochastic else target.argmax(-1)
            residual = residual - self.codebook[code]
            codes.append(code)
            targets.append(target)
        shape = z.shape[:-1]
        return torch.stack(codes, 1).view(*shape, self.depth), torch.stack(targets, 1).view(*shape, self.depth, -1)

    def forward(self, z: Tensor) -> Quantized:
        """Quantizes vectors [..., D]; in training mode the codebook takes one step for each depth."""
        codes, quantized = self.encode(z.detach())
        partial_sums = self.codebook[codes].cumsum(-2)  # [..., Q, D]
        commitment = F.mse_loss(z.unsqueeze(-2).expand_as(partial_sums), partial_sums)
        if self.training:
            residuals = z.detach().unsqueeze(-2) - partial_sums + self.codebook[codes]
            for depth in range(self.depth):
                self._update(residuals[..., depth, :].flatten(0, -2), codes[..., depth].flatten())
        return Quantized(z + (quantized - z).detach(), codes, commitment)


class MultichannelQuantizer(AveragedCodebook):
    """Each of Q equal groups of channels is replaced by its nearest vector of one shared codebook.

    Zheng et al., "MoVQ" (NeurIPS 2022), section 3.3. With one group it is the quantizer of VQ-VAE and VQGAN.
    """

    def __init__(self, codebook_size: int, dim: int, groups: int, metric: str = "l2", decay: float = 0.99):
        if dim % groups:
            raise ValueError(f"{dim} channels cannot be split into {groups} groups")
        if metric not in ("l2", "cosine"):
            raise ValueError(f"there is no metric {metric!r}")
        super().__init__(codebook_size, dim // groups, decay)
        self.groups, self.metric = groups, metric

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [..., D] -> codes int64 [..., Q] and the vectors that stand for them [..., D]."""
        codes = nearest(z.reshape(-1, self.codebook.shape[1]), self.codebook, self.metric)
        codes = codes.view(*z.shape[:-1], self.groups)
        return codes, self.decode(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [..., Q] -> vectors [..., D]."""
        table = F.normalize(self.codebook, dim=1) if self.metric == "cosine" else self.codebook
        return lookup(codes.reshape(-1, 1), table).view(*codes.shape[:-1], -1)

    def distances(self, z: Tensor, codes: Tensor) -> Tensor:
        """Squared distances [..., Q, K] of the channel groups of vectors [..., D] from the codebook, by the metric."""
        vectors, table = z.reshape(-1, self.codebook.shape[1]), self.codebook
        if self.metric == "cosine":
            vectors, table = F.normalize(vectors, dim=1), F.normalize(table, dim=1)
        return torch.cdist(vectors, table).square().view(*codes.shape, -1)

    def forward(self, z: Tensor) -> Quantized:
        """Quantizes vectors [..., D], by cosine their directions; in training mode the codebook takes one step."""
        if self.metric == "cosine":
            z = F.normalize(z.unflatten(-1, (self.groups, -1)), dim=-1).flatten(-2)
        codes, quantized = self.encode(z.detach())
        if self.training:
            self._update(z.detach().reshape(-1, self.codebook.shape[1]), codes.flatten())
        return Quantized(z + (quantized - z).detach(), codes, F.mse_loss(z, quantized))


class GumbelQuantizer(nn.Module):
    """A linear layer scores all codes, and the best one's vector stands for the input.

    The quantizer of DALL-E's dVAE (Ramesh et al., "Zero-Shot Text-to-Image Generation", ICML 2021) as VQGAN has it. The
    noise that gives it its name is of its training, for which there is no code here.
    """

    codebook: Tensor  # [K, D]

    def __init__(self, codebook_size: int, dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, codebook_size)
        self.register_buffer("codebook", torch.randn(codebook_size, dim))

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [..., D] -> codes int64 [..., 1] and the vectors that stand for them [..., D]."""
        codes = self.proj(z).argmax(-1, keepdim=True)
        return codes, self.decode(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [..., 1] -> vectors [..., D]."""
        return lookup(codes.reshape(-1, 1), self.codebook).view(*codes.shape[:-1], -1)

    def distances(self, z: Tensor, codes: Tensor) -> Tensor:
        """How far the score of each code is below the best one's [..., 1, K], of vectors [..., D]."""
        scores: Tensor = self.proj(z)
        return (scores.amax(-1, keepdim=True) - scores).unsqueeze(-2)

    def forward(self, z: Tensor) -> Quantized:
        """Quantizes vectors [..., D]; nothing here learns."""
        codes, quantized = self.encode(z)
        return Quantized(quantized, codes, z.new_zeros(()))


Quantizer = ResidualQuantizer | MultichannelQuantizer | GumbelQuantizer
"""The quantizer of a tokenizer with one code map."""


def _draw(vectors: Tensor, count: int) -> Tensor:
    """Random vectors of the batch [count, D], jittered copies where it has too few; the same on every rank."""
    if len(vectors) < count:
        vectors = vectors.repeat(-(-count // len(vectors)), 1)
        vectors = vectors + torch.rand_like(vectors) * 0.01 / vectors.shape[1] ** 0.5
    drawn = vectors[torch.randperm(len(vectors), device=vectors.device)[:count]]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(drawn, 0)
    return drawn
