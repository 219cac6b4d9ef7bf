"""Vector quantizers: codebooks, quantization, lookup, and training of codebooks."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.models.modules import Modules
from vqdeploy.models.ops import lookup, nearest, residual_quantize


class Quantized(NamedTuple):
    """The result of quantization in training."""

    vectors: Tensor  # straight-through estimate [..., D]
    codes: Tensor  # int64 [..., Q]
    commitment_loss: Tensor  # scalar
    codebook_loss: Tensor | float = 0.0  # scalar, for what the quantizer learns by gradients


class AveragedCodebook(nn.Module):
    """A codebook learned by exponential moving averages.

    Van den Oord et al., "Neural Discrete Representation Learning" (NeurIPS 2017), appendix A.1. A code whose
    moving count falls below 1 per step is restarted from a vector of the batch.
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
        """Codes int64 [..., Q], -1 to skip one -> vectors [..., D]."""
        return lookup(codes.flatten(0, -2), self.codebook).view(*codes.shape[:-1], -1)

    def distances(self, z: Tensor, codes: Tensor) -> Tensor:
        """Squared distances [..., Q, K] between the residuals of vectors [..., D] at each depth and the codebook."""
        residual, distances = z.flatten(0, -2), []
        for code in codes.flatten(0, -2).unbind(-1):
            distances.append(torch.cdist(residual, self.codebook).square())
            residual = residual - self.codebook[code]
        return torch.stack(distances, 1).view(*codes.shape, -1)

    def soft_codes(self, z: Tensor, temperature: float, stochastic: bool = True) -> tuple[Tensor, Tensor]:
        """Soft targets for the prior (section 3.3): at each depth the softmax of the negative squared distances.

        Args:
            z: Vectors [..., D].
            temperature: Divides the squared distances, above 0.
            stochastic: Whether to draw codes from the softmax; residuals follow the draw.

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
        """Quantizes vectors [..., D]; in training mode updates the codebook once per depth."""
        codes, quantized = self.encode(z.detach())
        partial_sums = self.codebook[codes].cumsum(-2)  # [..., Q, D]
        commitment = F.mse_loss(z.unsqueeze(-2).expand_as(partial_sums), partial_sums)
        if self.training:
            residuals = z.detach().unsqueeze(-2) - partial_sums + self.codebook[codes]
            for depth in range(self.depth):
                self._update(residuals[..., depth, :].flatten(0, -2), codes[..., depth].flatten())
        return Quantized(z + (quantized - z).detach(), codes, commitment)


class MultichannelQuantizer(AveragedCodebook):
    """Replaces each of Q equal groups of channels by the nearest vector of one shared codebook.

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
        """Vectors [..., D] -> codes int64 [..., Q] and their codebook vectors [..., D]."""
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
        """Quantizes vectors [..., D], normalized for `cosine`; in training mode updates the codebook."""
        if self.metric == "cosine":
            z = F.normalize(z.unflatten(-1, (self.groups, -1)), dim=-1).flatten(-2)
        codes, quantized = self.encode(z.detach())
        if self.training:
            self._update(z.detach().reshape(-1, self.codebook.shape[1]), codes.flatten())
        return Quantized(z + (quantized - z).detach(), codes, F.mse_loss(z, quantized))


class MultiScaleQuantizer(AveragedCodebook):
    """Residual quantization over scales: each scale quantizes what the coarser ones leave, averaged to a smaller map.

    Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (NeurIPS 2024),
    section 3.2 and algorithms 1 and 2. The vectors of a scale are enlarged to the whole map, of `sides[-1]`, and half
    of it is convolved. The scales share four convolutions.

    Codes are [B, N], those of all scales one after the other, each in raster order; maps of vectors [B, h * w, D].
    """

    down: Tensor  # [N, h * w], the averages of each position
    up: Tensor  # [N, h * w], the share of each position in the enlarged map
    mixing: Tensor  # [N, 4], 1 at the convolution of each position

    def __init__(self, codebook_size: int, dim: int, sides: tuple[int, ...], decay: float = 0.99):
        super().__init__(codebook_size, dim, decay)
        self.sides, self.sizes = sides, [side**2 for side in sides]
        if sum(self.sizes) * self.sizes[-1] > _LARGEST_MATRIX:
            raise ValueError(f"code maps of sides {sides} are too large")
        self.convolutions = Modules(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(_CONVOLUTIONS))
        down = [_on_both_axes(area_average(side, sides[-1])) for side in sides]
        up = [_on_both_axes(bicubic(side, sides[-1])).T for side in sides]
        chosen = torch.cat(
            [torch.full((size,), shared_convolution(s, len(sides))) for s, size in enumerate(self.sizes)]
        )
        self.register_buffer("down", torch.cat(down).float(), persistent=False)
        self.register_buffer("up", torch.cat(up).float(), persistent=False)
        self.register_buffer("mixing", F.one_hot(chosen, _CONVOLUTIONS).float(), persistent=False)

    def reduced(self, vectors: Tensor, scale: int) -> Tensor:
        """A whole map [B, h * w, D], averaged to the positions of a scale [B, p * p, D]."""
        return vectors if scale == len(self.sides) - 1 else self._rows(self.down, scale) @ vectors

    def enlarged(self, vectors: Tensor, scale: int) -> Tensor:
        """What vectors [B, p * p, D] of a scale add to the whole map [B, h * w, D]."""
        large = vectors if scale == len(self.sides) - 1 else self._rows(self.up, scale).T @ vectors
        convolution = self.convolutions[shared_convolution(scale, len(self.sides))]
        mixed: Tensor = convolution(large.mT.unflatten(-1, (self.sides[-1], -1))).flatten(2).mT
        return (large + mixed) / 2

    def _rows(self, matrix: Tensor, scale: int) -> Tensor:
        first = sum(self.sizes[:scale])
        return matrix[first : first + self.sizes[scale]]

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [B, h, w, D] -> codes int64 [B, N] and the sum of all scales [B, h, w, D]."""
        z = z.to(self.codebook.dtype)  # the sums are as exact as the codebook
        rest, codes = z.flatten(1, 2), []
        for scale in range(len(self.sides)):
            vectors = self.reduced(rest, scale)
            codes.append(nearest(vectors.flatten(0, 1), self.codebook, "l2").view(vectors.shape[:2]))
            rest = rest - self.enlarged(self._looked_up(codes[-1]), scale)
        return torch.cat(codes, 1), z - rest.view_as(z)

    def _looked_up(self, codes: Tensor) -> Tensor:
        return lookup(codes.reshape(-1, 1), self.codebook).view(*codes.shape, -1)

    def sums(self, codes: Tensor) -> list[Tensor]:
        """Codes int64 [B, N] -> the whole map after each scale [B, h * w, D]; a scale with a -1 adds nothing."""
        total, sums = torch.zeros(()).to(self.codebook), []
        for scale, own in enumerate(codes.split(self.sizes, 1)):
            known = (own >= 0).all(1)[:, None, None]
            total = total + self.enlarged(self._looked_up(own), scale) * known
            sums.append(total)
        return sums

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, N], -1 to leave out a scale -> vectors [B, h, w, D]."""
        whole: Tensor = self.sums(codes)[-1].unflatten(1, (self.sides[-1], -1))
        return whole

    def inputs(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, N] -> the map of the coarser scales, averaged to each position after the first scale.

        Returns:
            [B, N - p * p, D] for a first scale of side p.
        """
        sums = self.sums(codes)[:-1]
        return torch.cat([self.reduced(total, scale) for scale, total in enumerate(sums, 1)], 1)

    def distances(self, z: Tensor, codes: Tensor) -> Tensor:
        """Squared distances [B, N, K] of what is left of vectors [B, h, w, D] at each scale from the codebook."""
        whole = z.flatten(1, 2)
        rests = [whole, *(whole - total for total in self.sums(codes)[:-1])]
        vectors = torch.cat([self.reduced(rest, scale) for scale, rest in enumerate(rests)], 1)
        return torch.cdist(vectors, self.codebook).square()

    def forward(self, z: Tensor) -> Quantized:
        """Quantizes vectors [B, h, w, D]; in training mode updates the codebook.

        Losses are means over the scales. The convolutions learn from `codebook_loss`, the codebook by averages.
        """
        with torch.no_grad():
            codes, _ = self.encode(z)
        target, sums = z.flatten(1, 2), self.sums(codes)
        commitment = torch.stack([F.mse_loss(target, total.detach()) for total in sums]).mean()
        convolved = torch.stack([F.mse_loss(total, target.detach()) for total in sums]).mean()
        if self.training:
            rests = [target.detach(), *(target.detach() - total.detach() for total in sums[:-1])]
            vectors = torch.cat([self.reduced(rest, scale) for scale, rest in enumerate(rests)], 1)
            self._update(vectors.flatten(0, 1), codes.flatten())
        return Quantized(z + (sums[-1].view_as(z) - z).detach(), codes, commitment, convolved)


_CONVOLUTIONS = 4
_LARGEST_MATRIX = 2**26  # numbers; for images of 1024 pixels it is half as large


def shared_convolution(scale: int, scales: int) -> int:
    """Which of four convolutions a scale takes: the nearest of 1/12, 13/36, 23/36 and 11/12 to scale / (scales - 1).

    Two may be equally near, as for two of ten scales. The public code then decides by rounding, always for the upper.
    """
    return (18 * scale + scales - 1) // (5 * max(scales - 1, 1))


def area_average(size: int, whole: int) -> Tensor:
    """Averages of a row of `whole` numbers over `size` windows, which may overlap, float64 [size, whole]."""
    matrix = torch.zeros(size, whole, dtype=torch.float64)
    for i in range(size):
        first, last = i * whole // size, -(-(i + 1) * whole // size)
        matrix[i, first:last] = 1 / (last - first)
    return matrix


def bicubic(size: int, whole: int, a: float = -0.75) -> Tensor:
    """Bicubic enlargement of a row of `size` numbers to `whole`, float64 [whole, size].

    Keys, "Cubic convolution interpolation for digital image processing" (IEEE Transactions on Acoustics, Speech, and
    Signal Processing, 1981), with half-pixel centres and borders repeated, as PyTorch does it.
    """
    matrix = torch.zeros(whole, size, dtype=torch.float64)
    for i in range(whole):
        place = (i + 0.5) * size / whole - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            d = abs(place - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[i, min(max(tap, 0), size - 1)] += near if d <= 1 else far
    return matrix


def _on_both_axes(matrix: Tensor) -> Tensor:
    return torch.kron(matrix, matrix)


class GumbelQuantizer(nn.Module):
    """A linear layer scores all codes; the vector of the best one replaces the input.

    The quantizer of DALL-E's dVAE (Ramesh et al., "Zero-Shot Text-to-Image Generation", ICML 2021) as in VQGAN.
    Training with Gumbel noise is not implemented.
    """

    codebook: Tensor  # [K, D]

    def __init__(self, codebook_size: int, dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, codebook_size)
        self.register_buffer("codebook", torch.randn(codebook_size, dim))

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [..., D] -> codes int64 [..., 1] and their codebook vectors [..., D]."""
        codes = self.proj(z).argmax(-1, keepdim=True)
        return codes, self.decode(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [..., 1] -> vectors [..., D]."""
        return lookup(codes.reshape(-1, 1), self.codebook).view(*codes.shape[:-1], -1)

    def distances(self, z: Tensor, codes: Tensor) -> Tensor:
        """Best score minus the score of each code [..., 1, K], for vectors [..., D]."""
        scores: Tensor = self.proj(z)
        return (scores.amax(-1, keepdim=True) - scores).unsqueeze(-2)

    def forward(self, z: Tensor) -> Quantized:
        """Quantizes vectors [..., D]; not trainable."""
        codes, quantized = self.encode(z)
        return Quantized(quantized, codes, z.new_zeros(()))


Quantizer = ResidualQuantizer | MultichannelQuantizer | MultiScaleQuantizer | GumbelQuantizer
"""The quantizer of a tokenizer; VQ-VAE-2 has several."""


def _draw(vectors: Tensor, count: int) -> Tensor:
    """Random vectors of the batch [count, D], with jittered copies if it is too small; equal on all ranks."""
    if len(vectors) < count:
        vectors = vectors.repeat(-(-count // len(vectors)), 1)
        vectors = vectors + torch.rand_like(vectors) * 0.01 / vectors.shape[1] ** 0.5
    drawn = vectors[torch.randperm(len(vectors), device=vectors.device)[:count]]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(drawn, 0)
    return drawn
