"""Sampling in PyTorch with the algorithms of the public implementations, for training metrics and `bench`."""

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from vqdeploy.models.prior import AutoregressivePrior, Prior
from vqdeploy.models.var import VAR
from vqdeploy.reference import masked, next_scale
from vqdeploy.reference.guidance import Noise, guided_logits
from vqdeploy.runtime.threads import cores
from vqdeploy.systems import SYSTEMS, Sampling, SystemConfig

__all__ = ["Noise", "generate", "guided_logits", "torch_threads"]

_GUIDANCE = ("guidance_scale", "guidance_interval")


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch computes with as many CPU threads as an engine that was given `count`: 0 is one per core."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def generate(prior: Prior | AutoregressivePrior, config: SystemConfig, labels: Tensor, noise: Noise) -> Tensor:
    """Samples codes int64 [B, *grid] for labels [B] or texts [B, length], with the default options, on their device."""
    sampling: Sampling = config.sampling
    depth, size = config.prior.depth, config.prior.codebook_size
    choices = [value.to(labels.device).repeat(len(labels), 1) for value in _choices(sampling, depth, size)]
    if SYSTEMS[config.model].kind == "masked":
        return masked.generate(prior, config.sampling, labels, noise, choices)
    if SYSTEMS[config.model].kind == "next-scale":
        return next_scale.generate(cast(VAR, prior), config.sampling, labels, noise, choices)[0]
    shape = (len(labels), depth, size)
    guidance = [getattr(sampling, name) for name in _GUIDANCE if hasattr(sampling, name)]
    autoregressive = cast(AutoregressivePrior, prior)
    return autoregressive.generate(labels, lambda place: noise(place, shape).to(labels.device), *choices, *guidance)


def _choices(sampling: Sampling, depth: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Temperature, top-k and top-p [Q]; temperature 0 takes the most likely code, and top-k 0 keeps all.

    `bench` replaces the defaults of a checkpoint by options with one value, or one per depth.
    """
    temperature = torch.tensor(sampling.temperature, dtype=torch.float32).expand(depth)
    top_k = torch.tensor(sampling.top_k, dtype=torch.int64).expand(depth)
    top_p = torch.tensor(sampling.top_p, dtype=torch.float32).expand(depth)
    greedy = temperature < 1e-20  # logits divided by less overflow
    top_k = torch.where(greedy, 1, torch.where(top_k == 0, size, top_k))
    return torch.where(greedy, 1, temperature.clamp(max=1e20)), top_k, top_p
