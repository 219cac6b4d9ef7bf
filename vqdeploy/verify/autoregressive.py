"""Checks of autoregressive priors: the cached step, and whole generations."""

import math
from typing import Any

import numpy as np
import torch

from vqdeploy.reference import guided_logits
from vqdeploy.runtime import Pipeline
from vqdeploy.runtime.forcing import forced_logits, images_to_compare
from vqdeploy.runtime.noise import of_images as noise_of
from vqdeploy.systems import System
from vqdeploy.verify.checks import (
    IMAGES,
    SEED,
    Check,
    at_most,
    check_repeats,
    compare_distributions,
    compare_logits,
    judge,
    limits,
    own_tolerance,
    tolerance_of,
)

_SCALE = 3.0  # guidance scale


def check_logits(pipeline: Pipeline, system: System, rng: np.random.Generator) -> list[Check]:
    """Teacher-forced logits of the cached step, position by position and after prefill, against the full pass."""
    batch, config = 2, system.prior.config
    codes = rng.integers(0, config.codebook_size, (batch, config.positions, config.depth))
    labels = pipeline.condition.random(rng, batch)
    guided, allowed = _guidance(pipeline, _SCALE).get("guidance_scale", 1.0) != 1, limits(pipeline.manifest, "step")
    checks = []
    for name, prefix, scale in (
        ("cached step", 0, 1.0),
        ("prefix", config.positions // 2, 1.0),
        *([("guidance", 0, _SCALE)] if guided else []),
    ):
        known = np.where(np.arange(config.positions)[:, None] < prefix, codes, -1).reshape(batch, *config.grid)
        forced = torch.from_numpy(forced_logits(pipeline, codes, known, labels, **_guidance(pipeline, scale)))
        given = torch.from_numpy(codes).view(batch, *config.grid), torch.from_numpy(labels)
        expected = guided_logits(system.prior, *given, scale).view(batch, config.positions, config.depth, -1)
        checks += compare_logits(name, forced, expected[:, prefix:], allowed)
    labels = pipeline.condition.examples(images_to_compare(math.prod(pipeline.grid)))
    default = pipeline.sampling.options.get("guidance_scale", 1.0)
    drawn = pipeline.generate(labels, seed=SEED, **_guidance(pipeline, default)).codes
    for name, scale in (("", 1.0), *([("guidance, ", _SCALE)] if guided else [])):
        forced = torch.from_numpy(_own_logits(pipeline, drawn, labels, **_guidance(pipeline, scale)))
        expected = guided_logits(system.prior, torch.from_numpy(drawn), torch.from_numpy(labels), scale)
        checks += compare_distributions(f"{name}drawn codes", forced, expected.reshape(forced.shape), allowed, scale)
    return checks


def _own_logits(pipeline: Pipeline, codes: np.ndarray, labels: np.ndarray, **options: object) -> np.ndarray:
    """Logits of the plan [B, positions, Q, K] at each of its codes [B, ...], given those before."""
    places = codes.reshape(len(codes), -1, pipeline.grid[-1] if codes.ndim > 2 else 1)
    return forced_logits(pipeline, places, np.full_like(codes, -1), labels, **options)


def check_generation(pipeline: Pipeline, system: System, logits: list[Check]) -> list[Check]:
    """Whole generations by the margin rule for tokens; an image alone against the same image in a batch.

    `logits` are the checks of `check_logits`, which determine the margin; see `own_tolerance`.
    """
    unguided = [check for check in logits if not check.metric.startswith("guidance")]
    tolerance = None if pipeline.quantized else tolerance_of(unguided)
    labels = pipeline.condition.examples(IMAGES)
    checks = []
    distributions: dict[str, dict[str, Any]] = {
        "full distribution": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        "truncated": {"temperature": 0.8, "top_k": pipeline.codebook_size // 4, "top_p": 0.9},
    }
    for options, scale in zip(distributions.values(), (_SCALE, 1.0), strict=True):
        options |= _guidance(pipeline, scale)
    if "guidance_interval" in pipeline.sampling.options:
        for options in distributions.values():
            options["guidance_interval"] = -1
        first = distributions["full distribution"] | {"guidance_interval": system.prior.config.positions // 2}
        distributions = {"guidance at first": first} | distributions

    def judged(codes: np.ndarray, labels: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        return _judge(pipeline, system, codes, labels, first, options, tolerance)

    for name, options in distributions.items():
        codes = pipeline.generate(labels, seed=SEED, **options).codes
        far, _ = judged(codes, labels, 0)
        checks.append(at_most("generate", f"{name}: tokens outside the margin rule", far.sum(), 0))
    return checks + check_repeats(pipeline, codes, labels, options, judged)


def _guidance(pipeline: Pipeline, scale: object) -> dict[str, Any]:
    """The option for a guidance scale, if the plan has it; 1 if a call has no two rows for an image."""
    if "guidance_scale" not in pipeline.sampling.options:
        return {}
    return {"guidance_scale": scale if pipeline.manifest.batch.max > 1 else 1.0}


def _judge(
    pipeline: Pipeline,
    system: System,
    codes: np.ndarray,
    labels: np.ndarray,
    first: int,
    options: dict[str, Any],
    tolerance: float | None,
) -> tuple[np.ndarray, np.ndarray]:
    """`judge` for generated codes, given the codes before each; both results have the shape of the codes.

    Without a tolerance the logits are those of the plan itself.
    """
    guidance = {name: options[name] for name in ("guidance_scale", "guidance_interval") if name in options}
    scale, interval = guidance.get("guidance_scale", 1.0), guidance.get("guidance_interval", -1)
    if tolerance is None:
        logits = torch.from_numpy(_own_logits(pipeline, codes, labels, **guidance)).flatten(0, -2)
        tolerance = own_tolerance(logits)
    else:
        given = torch.from_numpy(codes), torch.from_numpy(labels)
        logits = guided_logits(system.prior, *given, scale, interval).flatten(0, -2)
        tolerance *= 2 * scale if scale != 1 else 1  # guidance amplifies errors of logits
    config = system.prior.config
    images, shape = range(first, first + len(codes)), (config.depth, config.codebook_size)
    drawn = np.stack([noise_of(SEED, images, position, shape) for position in range(config.positions)], 1)
    noise = torch.from_numpy(drawn).flatten(0, 2)
    far, close = judge(logits, noise, torch.from_numpy(codes).flatten(), options, tolerance)
    return far.view(codes.shape).numpy(), close.view(codes.shape).numpy()
