"""Sampling in PyTorch with the algorithms of the public implementations, for training metrics and `bench`."""

from typing import cast

import torch
from torch import Tensor

from vqdeploy.models.prior import AutoregressivePrior, Prior
from vqdeploy.reference import masked
from vqdeploy.reference.guidance import Noise, guided_logits
from vqdeploy.systems import GuidedSampling, MaskedSampling, Sampling, SystemConfig

__all__ = ["Noise", "generate", "guided_logits"]


@torch.no_grad()
def generate(prior: Prior | AutoregressivePrior, config: SystemConfig, labels: Tensor, noise: Noise) -> Tensor:
    """Samples codes int64 [B, *grid] for labels [B], with the default options, on the device of the labels."""
    sampling: Sampling = config.sampling
    depth, size = config.prior.depth, config.prior.codebook_size
    choices = [torch.full((len(labels), depth), value, device=labels.device) for value in _choices(sampling, size)]
    if isinstance(sampling, MaskedSampling):
        return masked.generate(prior, sampling, labels, noise, choices)
    shape = (len(labels), depth, size)
    guidance = [sampling.guidance_scale] if isinstance(sampling, GuidedSampling) else []
    autoregressive = cast(AutoregressivePrior, prior)
    return autoregressive.generate(labels, lambda place: noise(place, shape).to(labels.device), *choices, *guidance)


def _choices(sampling: Sampling, size: int) -> tuple[float, int, float]:
    """Temperature, top-k and top-p; temperature 0 takes the most likely code, and top-k 0 keeps all."""
    greedy = sampling.temperature < 1e-20  # beyond which logits overflow
    temperature = 1.0 if greedy else min(float(sampling.temperature), 1e20)
    top_k = 1 if greedy else sampling.top_k or size
    return temperature, top_k, float(sampling.top_p)
