"""Parallel decoding of masked codes in PyTorch (Chang et al., "MaskGIT", CVPR 2022, section 3.2)."""

from typing import Any

import torch
from torch import Tensor

from vqdeploy.models.maskgit import unmask
from vqdeploy.reference.guidance import Noise, guided_logits
from vqdeploy.runtime.schedules import BY_ORDER, choice_temperature, masked_counts, order_noise
from vqdeploy.systems import MaskedSampling


def generate(prior: Any, sampling: MaskedSampling, labels: Tensor, noise: Noise, options: list[Tensor]) -> Tensor:
    """Codes [B, h, w, Q] for labels [B]; `options` are temperature, top-k and top-p [B, Q]."""
    config, device = prior.config, labels.device
    shape = (len(labels), *config.grid)
    temperature, top_k, top_p = options
    unknown = codes = drawn = torch.full(shape, config.codebook_size, device=device)
    by_order = sampling.schedule == "halton"
    order = torch.from_numpy(order_noise(config.grid)).to(device).expand(shape)
    for step, masked in enumerate(masked_counts(sampling.schedule, codes[0].numel(), sampling.steps)):
        heat = choice_temperature(sampling.choice_temperature, step, sampling.steps)
        drawn, codes = unmask(
            guided_logits(prior, codes, labels, sampling.guidance_scale),
            given=unknown if by_order else codes,
            noise=noise(2 * step, (*shape, config.codebook_size)).to(device),
            choice_noise=order if by_order else noise(2 * step + 1, shape).to(device),
            masked=torch.full((len(labels),), int(masked), device=device),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            choice_temperature=torch.full((len(labels),), BY_ORDER if by_order else heat, device=device),
        )
    return drawn
