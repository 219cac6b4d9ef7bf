"""Checks of priors of several levels: the incremental sampler against the full forward pass, and whole generations."""

import numpy as np
import torch

from vqdeploy.runtime import Pipeline
from vqdeploy.runtime.hierarchical import HierarchicalSampler
from vqdeploy.systems import System
from vqdeploy.verify.autoregressive import check_generation
from vqdeploy.verify.checks import Check, compare_logits, limits

_LABELS = 10  # that are tried at most

__all__ = ["check_generation", "check_logits"]


def check_logits(pipeline: Pipeline, system: System, rng: np.random.Generator) -> list[Check]:
    """Teacher-forced logits of each level, row by row and place by place, against the full forward pass."""
    config = system.prior.config
    batch = max(2, min(config.classes, _LABELS))
    codes = rng.integers(0, config.codebook_size, (batch, *config.grid))
    labels, above = np.arange(batch) % config.classes, None
    reference = system.prior.logits(torch.from_numpy(codes), torch.from_numpy(labels))
    sessions = {name: pipeline.session(name) for name in pipeline.stages}
    levels = HierarchicalSampler(sessions, pipeline.manifest.config["prior"]).levels
    options = {"temperature": 1, "top_k": config.codebook_size, "top_p": 1}
    checks, first = [], 0
    for level, given in zip(levels, pipeline.maps(codes), strict=True):
        given, found = given[..., 0], []
        for _, _, binding in level.places(given, labels, above, options):
            level.run("pixel", binding)
            found.append(np.array(binding.outputs["logits"][:, 0]))
        logits = torch.from_numpy(np.stack(found, 1))
        expected = reference[:, first : first + logits.shape[1]]
        checks += compare_logits(level.name, logits, expected, limits(pipeline.manifest.precision))
        above, first = given, first + logits.shape[1]
    return checks
