"""What a tokenizer and the samples of a prior reach. Images are uint8 [N, 3, R, R]."""

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from vqdeploy.models import System, SystemConfig
from vqdeploy.models.rqvae import RQVAE
from vqdeploy.training.data import to_range, to_uint8


def psnr(images: Tensor, originals: Tensor) -> float:
    """Mean over the images of their PSNR in dB, on 8-bit pixels."""
    pair = images.float(), originals.float()
    return float(peak_signal_noise_ratio(*pair, data_range=255.0, reduction="elementwise_mean", dim=(1, 2, 3)))


def codebook_use(codes: Tensor, size: int) -> dict[str, list[float]]:
    """Share of the codebook in use and perplexity of the codes [..., Q], at each depth."""
    counts = torch.stack([torch.bincount(depth, minlength=size) for depth in codes.flatten(0, -2).T]).double()
    entropy = torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1)
    return {"usage": (counts > 0).double().mean(1).tolist(), "perplexity": entropy.exp().tolist()}


@torch.no_grad()
def reconstruct(tokenizer: RQVAE, images: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Images -> their reconstructions, and the codes between."""
    pixel_range, device = tokenizer.config.pixel_range, next(tokenizer.parameters()).device
    pixels, codes = [], []
    for part in images.split(batch_size):
        codes.append(tokenizer.encode(to_range(part.to(device), pixel_range)))
        pixels.append(to_uint8(tokenizer.decode(codes[-1]), pixel_range))
    return torch.cat(pixels).cpu(), torch.cat(codes).cpu()


@torch.no_grad()
def generate(system: System, labels: Tensor, seed: int, batch_size: int = 100) -> Tensor:
    """One image for each label [N], with the default sampling options of the system."""
    generator = torch.Generator().manual_seed(seed)
    device = next(system.prior.parameters()).device
    images = []
    for part in labels.split(batch_size):
        noise = _GumbelNoise((len(part), system.config.prior.depth, system.config.prior.codebook_size), generator)
        options = (option.to(device) for option in _sampling(system.config, len(part)))
        codes = system.prior.generate(part.to(device), noise, *options)
        images.append(to_uint8(system.tokenizer.decode(codes), system.config.tokenizer.pixel_range).cpu())
    return torch.cat(images)


class _GumbelNoise:
    """Noise drawn when a position asks for it: that of all positions at once would be large."""

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator):
        self.shape, self.generator = shape, generator

    def __getitem__(self, position: int) -> Tensor:
        return -torch.empty(self.shape).exponential_(generator=self.generator).log()


def _sampling(config: SystemConfig, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    shape, sampling = (batch, config.prior.depth), config.sampling
    top_k = sampling.top_k or config.prior.codebook_size
    return torch.full(shape, sampling.temperature), torch.full(shape, top_k), torch.full(shape, sampling.top_p)


def diversity(samples: Tensor, labels: Tensor, originals: Tensor, original_labels: Tensor) -> float:
    """Mean distance between two samples of a class over that between two originals of it, averaged over the classes.

    About 1 when samples vary as the data do, 0 when a class has one picture.
    """
    ratios = []
    for label in labels.unique():
        pair = samples[labels == label], originals[original_labels == label]
        ratios.append(torch.stack([torch.pdist(images.flatten(1).float()).mean() for images in pair]))
    of_samples, of_originals = torch.stack(ratios).T
    return float((of_samples / of_originals).nanmean())
