"""Checks of priors of several levels: the incremental sampler against the full forward pass, and whole generations."""

import math

import numpy as np
import torch

from vqdeploy.runtime import Pipeline
from vqdeploy.runtime.manifest import level_names
from vqdeploy.systems import System
from vqdeploy.verify.autoregressive import check_generation
from vqdeploy.verify.checks import Check, compare_logits, limits
from vqdeploy.verify.forcing import forced_logits

_LABELS = 10  # most labels to try

__all__ = ["check_generation", "check_logits"]


def check_logits(pipeline: Pipeline, system: System, rng: np.random.Generator) -> list[Check]:
    """Teacher-forced logits of each level, row by row and position by position, against the full forward pass."""
    config = system.prior.config
    batch = max(2, min(config.classes, _LABELS))
    codes = rng.integers(0, config.codebook_size, (batch, *config.grid))
    labels = np.arange(batch) % config.classes
    reference = system.prior.logits(torch.from_numpy(codes), torch.from_numpy(labels))
    logits = torch.from_numpy(forced_logits(pipeline, codes[..., None], np.full_like(codes, -1), labels))[:, :, 0]
    sizes = [math.prod(each) for each in pipeline.layout.maps]
    checks = []
    for name, found, expected in zip(
        level_names(len(sizes)), logits.split(sizes, 1), reference.split(sizes, 1), strict=True
    ):
        checks += compare_logits(name, found, expected, limits(pipeline.manifest.precision))
    return checks
