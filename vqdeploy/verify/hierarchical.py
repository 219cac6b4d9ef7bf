"""Checks of priors of several levels: the incremental sampler against the full forward pass, and whole generations."""

import math
from collections.abc import Callable

import numpy as np
import torch

from vqdeploy.precision import Limits
from vqdeploy.runtime import Pipeline
from vqdeploy.runtime.forcing import forced_logits, images_to_compare
from vqdeploy.runtime.manifest import level_names
from vqdeploy.systems import System
from vqdeploy.verify.autoregressive import check_generation
from vqdeploy.verify.checks import SEED, Check, compare_distributions, compare_logits, limits

_Compare = Callable[[str, torch.Tensor, torch.Tensor, Limits], list[Check]]
_LABELS = 10  # most labels to try

__all__ = ["check_generation", "check_logits"]


def check_logits(pipeline: Pipeline, system: System, rng: np.random.Generator) -> list[Check]:
    """Teacher-forced logits of each level, row by row and position by position, against the full forward pass."""
    config = system.prior.config
    sizes = [math.prod(each) for each in pipeline.layout.maps]
    labels = np.arange(max(2, min(config.classes, _LABELS))) % config.classes
    codes = rng.integers(0, config.codebook_size, (len(labels), *config.grid))
    many = pipeline.condition.examples(images_to_compare(min(sizes)))
    drawn = pipeline.generate(many, seed=SEED).codes
    checks = []
    compares: list[tuple[str, _Compare, np.ndarray, np.ndarray]]
    compares = [("", compare_logits, codes, labels), (", drawn codes", compare_distributions, drawn, many)]
    for kind, compare, given, labels in compares:
        expected = system.prior.logits(torch.from_numpy(given), torch.from_numpy(labels))
        forced = forced_logits(pipeline, given[..., None], np.full_like(given, -1), labels)[:, :, 0]
        levels = torch.from_numpy(forced).split(sizes, 1), expected.split(sizes, 1)
        for name, found, wanted in zip(level_names(len(sizes)), *levels, strict=True):
            allowed = limits(pipeline.manifest, f"{name}_row", f"{name}_pixel")
            checks += compare(name + kind, found, wanted, allowed)
    return checks
