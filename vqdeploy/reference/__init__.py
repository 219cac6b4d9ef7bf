"""Whole generations in PyTorch, as the public implementations do them: to watch a training by, and for `bench`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqdeploy.models.maskgit import MaskGITConfig, unmask
from vqdeploy.runtime.options import for_graph
from vqdeploy.runtime.schedules import BY_ORDER, choice_temperature, masked_counts, order_noise
from vqdeploy.systems.system import GuidedSampling, MaskedSampling, SystemConfig

Noise = Callable[[int, tuple[int, ...]], Tensor]
"""Index of a draw and a shape [B, ...] -> standard Gumbel noise float32; the plan's loops count draws alike."""


@torch.no_grad()
def generate(prior: Any, config: SystemConfig, labels: Tensor, noise: Noise) -> Tensor:
    """Codes [B, h, w, Q] for labels [B], with the default options of a system, on the device of the labels."""
    sampling, depth = config.sampling, config.prior.depth
    arrays = for_graph(sampling.to_dict(), depth, config.prior.codebook_size)
    options = [torch.tensor(array, device=labels.device).repeat(len(labels), 1) for array in arrays.values()]
    if isinstance(sampling, MaskedSampling):
        return _generate_masked(prior, config.prior, sampling, labels, noise, options)
    shape = (len(labels), depth, config.prior.codebook_size)
    guidance = [sampling.guidance_scale] if isinstance(sampling, GuidedSampling) else []
    return prior.generate(labels, lambda position: noise(position, shape).to(labels.device), *options, *guidance)


def _generate_masked(
    prior: Any, config: MaskGITConfig, sampling: MaskedSampling, labels: Tensor, noise: Noise, options: list[Tensor]
) -> Tensor:
    shape, device = (len(labels), *config.grid), labels.device
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


def guided_logits(prior: Any, codes: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Logits without the label, moved towards and beyond those with it (Ho and Salimans, 2022); 1 is no guidance."""
    if scale == 1:
        return prior.logits(codes, labels)
    both = prior.logits(codes.repeat(2, 1, 1, 1), torch.cat([labels, torch.full_like(labels, prior.config.classes)]))
    conditional, unconditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)
