"""Checks of the stage `features`: what each layer of a prior makes of known codes."""

import numpy as np
import torch

from vqdeploy.errors import ArtifactError
from vqdeploy.runtime import Pipeline
from vqdeploy.runtime.pipeline import batches
from vqdeploy.systems import System
from vqdeploy.verify.checks import IMAGES, Check, at_most, limits


def check_features(pipeline: Pipeline, system: System, rng: np.random.Generator) -> list[Check]:
    """Averaged hidden states of every layer, with labels and without.

    Raises:
        ArtifactError: The prior has none.
    """
    if not hasattr(system.prior, "features"):
        raise ArtifactError("the plan has a stage `features`, but its prior has no features", found=system.config.model)
    config = system.prior.config
    codes = rng.integers(0, config.codebook_size, (IMAGES, *config.grid))
    labels = rng.integers(0, config.classes, IMAGES)
    if config.null_label:
        labels[1::2] = config.classes
    parts = batches(IMAGES, pipeline.manifest.batch.max)
    states = [pipeline.run("features", codes=codes[part], label=labels[part])["features"] for part in parts]
    found = torch.from_numpy(np.concatenate(states))
    inputs = torch.from_numpy(codes), torch.from_numpy(labels)
    expected = torch.stack([system.prior.features(*inputs, layer) for layer in range(config.layers + 1)], 1)
    difference, limit = (found - expected).abs(), limits(pipeline.manifest, "features").logits * expected.abs().max()
    return [at_most("features", "largest difference of averaged states", float(difference.max()), float(limit))]
