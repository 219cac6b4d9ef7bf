"""Sampling in PyTorch with the algorithms of the public implementations, for training metrics and `bench`."""

from typing import Any

import torch
from torch import Tensor

from vqdeploy.reference import masked
from vqdeploy.reference.guidance import Noise, guided_logits
from vqdeploy.runtime.options import for_graph
from vqdeploy.systems import SYSTEMS, SystemConfig

__all__ = ["Noise", "generate", "guided_logits"]


@torch.no_grad()
def generate(prior: Any, config: SystemConfig, labels: Tensor, noise: Noise) -> Tensor:
    """Samples codes int64 [B, *grid] for labels [B] or texts [B, length], with the default options, on their device."""
    options = config.sampling.to_dict()
    depth, size = config.prior.depth, config.prior.codebook_size
    arrays = for_graph(options, depth, size)
    choices = [torch.tensor(array, device=labels.device).repeat(len(labels), 1) for array in arrays.values()]
    if SYSTEMS[config.model].kind == "masked":
        return masked.generate(prior, config.sampling, labels, noise, choices)
    shape = (len(labels), depth, size)
    guidance = [options["guidance_scale"]] if "guidance_scale" in options else []
    codes: Tensor = prior.generate(labels, lambda place: noise(place, shape).to(labels.device), *choices, *guidance)
    return codes
