"""Parallel decoding of masked codes in PyTorch (Chang et al., "MaskGIT", CVPR 2022, section 3.2)."""

import torch
from torch import Tensor

from vqdeploy.models.maskgit import unmask
from vqdeploy.models.prior import Prior
from vqdeploy.reference.guidance import Noise, guided_logits
from vqdeploy.reference.schedules import choice_weight, halton_ranks, masked_counts
from vqdeploy.systems import MaskedSampling

_BY_ORDER = 1e6  # weight of the order, beside which no log-probability counts


def generate(prior: Prior, sampling: MaskedSampling, labels: Tensor, noise: Noise, options: list[Tensor]) -> Tensor:
    """Codes [B, h, w, Q] for labels [B]; `options` are temperature, top-k and top-p [B, Q]."""
    config, device = prior.config, labels.device
    shape = (len(labels), *config.grid)
    temperature, top_k, top_p = options
    unknown = codes = drawn = torch.full(shape, config.codebook_size, device=device)
    by_order = sampling.schedule == "halton"
    order = halton_ranks(config.grid).to(device).expand(shape)
    for step, masked in enumerate(masked_counts(sampling.schedule, codes[0].numel(), sampling.steps)):
        weight = choice_weight(sampling.choice_temperature, step, sampling.steps)
        drawn, codes = unmask(
            guided_logits(prior, codes, labels, sampling.guidance_scale),
            given=unknown if by_order else codes,
            noise=noise(2 * step, (*shape, config.codebook_size)).to(device),
            choice_noise=-order if by_order else noise(2 * step + 1, shape).to(device),
            masked=torch.full((len(labels),), masked, device=device),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            choice_temperature=torch.full((len(labels),), _BY_ORDER if by_order else weight, device=device),
        )
    return drawn
