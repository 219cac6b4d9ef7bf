"""Metrics of tokenizers and of samples. Images are uint8 [N, 3, R, R], on the CPU."""

from collections.abc import Iterable

import torch
from torch import Tensor

from vqdeploy.models.pixels import to_range, to_uint8
from vqdeploy.models.vqvae2 import AnyTokenizer
from vqdeploy.reference import Noise
from vqdeploy.reference import generate as sample_codes
from vqdeploy.systems import System

_LEAST_ERROR = 1e-5  # squared grey levels: bounds the PSNR, as JSON has no infinity


def psnr(images: Tensor, originals: Tensor) -> float:
    """Mean PSNR in dB of images uint8 [N, ...] against `originals` of the same shape; at most 98 dB."""
    errors = (images.double() - originals.double()).square().flatten(1).mean(1).clamp(min=_LEAST_ERROR)
    return float((10 * torch.log10(255**2 / errors)).mean())


def codebook_use(depths: Iterable[Tensor], size: int) -> dict[str, list[float]]:
    """Codebook usage (0..1) and perplexity of the codes, per depth.

    Args:
        depths: The codes of each depth, int64 [...]; see `Tokenizer.depths`.
        size: Number of codes in the codebook, K.

    Returns:
        `usage` and `perplexity`, each with one number per depth.
    """
    counts = torch.stack([torch.bincount(codes.flatten(), minlength=size) for codes in depths]).double()
    entropy = torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1)
    return {"usage": (counts > 0).double().mean(1).tolist(), "perplexity": entropy.exp().tolist()}


@torch.no_grad()
def reconstruct(tokenizer: AnyTokenizer, images: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, R, R] -> reconstructions uint8 [N, 3, R, R] and codes int64 [N, *grid]."""
    pixel_range, device = tokenizer.config.pixel_range, next(tokenizer.parameters()).device
    parts = torch.split(images, batch_size)
    codes = torch.cat([tokenizer.encode(to_range(part.to(device), pixel_range)).cpu() for part in parts])
    return decode(tokenizer, codes, batch_size), codes


@torch.no_grad()
def decode(tokenizer: AnyTokenizer, codes: Tensor, batch_size: int = 64) -> Tensor:
    """Codes int64 [N, *grid] -> images uint8 [N, 3, R, R]."""
    device = next(tokenizer.parameters()).device
    images = [tokenizer.decode(part.to(device)) for part in torch.split(codes, batch_size)]
    return torch.cat([to_uint8(part, tokenizer.config.pixel_range).cpu() for part in images])


@torch.no_grad()
def generate(system: System, labels: Tensor, seed: int, batch_size: int = 100) -> Tensor:
    """Images uint8 [N, 3, R, R] for labels int64 [N], with the default sampling options of the system."""
    generator = torch.Generator().manual_seed(seed)
    device = next(system.prior.parameters()).device
    images = []
    for part in torch.split(labels, batch_size):
        codes = sample_codes(system.prior, system.config, part.to(device), _gumbel_noise(generator))
        images.append(to_uint8(system.tokenizer.decode(codes), system.config.tokenizer.pixel_range).cpu())
    return torch.cat(images)


def _gumbel_noise(generator: torch.Generator) -> Noise:
    return lambda index, shape: -torch.empty(shape).exponential_(generator=generator).log()


def diversity(samples: Tensor, labels: Tensor, originals: Tensor, original_labels: Tensor) -> float | None:
    """Mean distance between two samples of a class over that between two real images of it, averaged over the classes.

    About 1 if samples vary like the data, 0 if all samples of a class are equal. Only classes with two samples and two
    different real images count; None without any.

    Args:
        samples: Images uint8 [N, 3, R, R].
        labels: Their labels int64 [N].
        originals: Real images uint8 [M, 3, R, R].
        original_labels: Their labels int64 [M].
    """
    ratios = []
    for label in torch.unique(labels):
        of_samples, of_originals = _spread(samples[labels == label]), _spread(originals[original_labels == label])
        if of_samples is not None and of_originals:
            ratios.append(of_samples / of_originals)
    return sum(ratios) / len(ratios) if ratios else None


def _spread(images: Tensor) -> float | None:
    """Mean distance between two images; None for fewer than two."""
    return float(torch.pdist(images.flatten(1).float()).mean()) if len(images) > 1 else None
