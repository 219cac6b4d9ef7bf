"""Checks of autoregressive priors: the cached step, and whole generations."""

from typing import Any

import numpy as np
import torch

from vqdeploy.reference import guided_logits
from vqdeploy.runtime import Pipeline
from vqdeploy.runtime.forcing import forced_logits
from vqdeploy.runtime.noise import of_images as noise_of
from vqdeploy.systems import System
from vqdeploy.verify.checks import (
    IMAGES,
    SEED,
    Check,
    at_most,
    compare_distributions,
    compare_logits,
    drawn_images,
    judge,
    limits,
    tolerance_of,
)

_SCALE = 3.0  # guidance scale


def check_logits(pipeline: Pipeline, system: System, rng: np.random.Generator) -> list[Check]:
    """Teacher-forced logits of the cached step, position by position and after prefill, against the full pass."""
    batch, config = 2, system.prior.config
    codes = rng.integers(0, config.codebook_size, (batch, config.positions, config.depth))
    labels = pipeline.condition.random(rng, batch)
    reference = system.prior.logits(torch.from_numpy(codes).view(batch, *config.grid), torch.from_numpy(labels))
    reference = reference.view(batch, config.positions, config.depth, -1)
    checks = []
    for name, prefix in (("cached step", 0), ("prefix", config.positions // 2)):
        known = np.where(np.arange(config.positions)[:, None] < prefix, codes, -1)
        forced = forced_logits(pipeline, codes, known.reshape(batch, *config.grid), labels)
        logits = torch.from_numpy(forced)
        checks += compare_logits(name, logits, reference[:, prefix:], limits(pipeline.manifest, "step"))
    labels = pipeline.condition.examples(drawn_images(pipeline))
    drawn = pipeline.generate(labels, seed=SEED).codes
    forced = forced_logits(pipeline, drawn.reshape(len(labels), config.positions, -1), np.full_like(drawn, -1), labels)
    expected = system.prior.logits(torch.from_numpy(drawn), torch.from_numpy(labels)).reshape(forced.shape)
    return checks + compare_distributions(
        "drawn codes", torch.from_numpy(forced), expected, limits(pipeline.manifest, "step")
    )


def check_generation(pipeline: Pipeline, system: System, logits: list[Check]) -> list[Check]:
    """Whole generations by the margin rule for tokens; an image alone against the same image in a batch.

    `logits` are the checks of `check_logits`, which determine the margin.
    """
    tolerance = tolerance_of(logits)
    labels = pipeline.condition.examples(IMAGES)
    checks = []
    distributions: dict[str, dict[str, Any]] = {
        "full distribution": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        "truncated": {"temperature": 0.8, "top_k": pipeline.codebook_size // 4, "top_p": 0.9},
    }
    if "guidance_scale" in pipeline.sampling.options:
        for options, scale in zip(distributions.values(), (_SCALE, 1.0), strict=True):
            options["guidance_scale"] = scale
    if "guidance_interval" in pipeline.sampling.options:
        for options in distributions.values():
            options["guidance_interval"] = -1
        first = distributions["full distribution"] | {"guidance_interval": system.prior.config.positions // 2}
        distributions = {"guidance at first": first} | distributions
    for name, options in distributions.items():
        codes = pipeline.generate(labels, seed=SEED, **options).codes
        far, _ = _judge(system, codes, labels, 0, options, tolerance)
        checks.append(at_most("generate", f"{name}: tokens outside the margin rule", far.sum(), 0))
    again = pipeline.generate(labels, seed=SEED, **options).codes
    checks.append(at_most("generate", "codes that differ in a second run", (again != codes).sum(), 0))

    chosen = IMAGES - 2
    label = labels[chosen : chosen + 1]
    alone = pipeline.generate(label, seed=SEED, first_image=chosen, **options).codes
    far, close = _judge(system, alone, label, chosen, options, tolerance)
    different = np.flatnonzero((alone != codes[chosen : chosen + 1]).ravel())
    excused = different.size == 0 or close.ravel()[different[0]]
    checks.append(at_most("generate", "image alone: tokens outside the margin rule", far.sum() + (not excused), 0))
    return checks


def _judge(
    system: System, codes: np.ndarray, labels: np.ndarray, first: int, options: dict[str, Any], tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """`judge` for generated codes, given the codes before each; both results have the shape of the codes."""
    scale, interval = options.get("guidance_scale", 1.0), options.get("guidance_interval", -1)
    given = torch.from_numpy(codes), torch.from_numpy(labels)
    logits = guided_logits(system.prior, *given, scale, interval).flatten(0, -2)
    tolerance *= 2 * scale if scale != 1 else 1  # guidance amplifies errors of logits
    config = system.prior.config
    images, shape = range(first, first + len(codes)), (config.depth, config.codebook_size)
    drawn = np.stack([noise_of(SEED, images, position, shape) for position in range(config.positions)], 1)
    noise = torch.from_numpy(drawn).flatten(0, 2)
    far, close = judge(logits, noise, torch.from_numpy(codes).flatten(), options, tolerance)
    return far.view(codes.shape).numpy(), close.view(codes.shape).numpy()
