"""Checks of priors that predict the next scale: each map of a generation, and the blended maps of `more_smooth`."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqdeploy.models.ops import truncate
from vqdeploy.models.pixels import channels_last, to_uint8
from vqdeploy.models.var import VAR, blended
from vqdeploy.reference.next_scale import guided_at
from vqdeploy.runtime import Pipeline
from vqdeploy.runtime.forcing import images_to_compare, scale_logits, scale_outputs
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
from vqdeploy.verify.tokenizer import compare_images

_SCALE = 3.0  # guidance scale
_BLENDED = 5e-3  # of the largest number: blending sharpens differences of logits up to 150 times
_ONE_LABEL = "one label"
_CUT: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}


def check_logits(pipeline: Pipeline, system: System, rng: np.random.Generator) -> list[Check]:
    """Logits of all scales at random codes and at drawn ones, with one label and with guidance."""
    allowed = limits(pipeline.manifest, "step")
    labels = pipeline.condition.examples(IMAGES)
    codes = rng.integers(0, pipeline.codebook_size, (IMAGES, *pipeline.grid))
    many = pipeline.condition.examples(images_to_compare(math.prod(pipeline.grid)))
    drawn = pipeline.generate(many, seed=SEED, more_smooth=0).codes
    checks = []
    for name, scale in ((_ONE_LABEL, 1.0), ("guidance", _SCALE)):
        expected = _logits(system.prior, codes, labels, scale)
        found = torch.from_numpy(scale_logits(pipeline, codes, labels, guidance_scale=scale))
        checks += compare_logits(name, found, expected, allowed)
        expected = _logits(system.prior, drawn, many, scale)
        found = torch.from_numpy(scale_logits(pipeline, drawn, many, guidance_scale=scale))
        checks += compare_distributions(f"{name}, drawn codes", found, expected, allowed, scale)
    return checks


def check_generation(pipeline: Pipeline, system: System, logits: list[Check]) -> list[Check]:
    """Whole generations by the margin rule; an image alone against itself in a batch; blended maps.

    `logits` are the checks of `check_logits`, which determine the margin; see `own_tolerance`.
    """
    one_label = [check for check in logits if check.metric.startswith(_ONE_LABEL)]
    tolerance = None if pipeline.quantized else tolerance_of(one_label)
    labels = pipeline.condition.examples(IMAGES)
    whole, cut = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}, _CUT | {"top_k": pipeline.codebook_size // 4}
    kinds: dict[str, dict[str, Any]] = {
        "full distribution, guided": whole | {"guidance_scale": _SCALE, "more_smooth": 0},
        "truncated": cut | {"guidance_scale": 1.0, "more_smooth": 0},
    }
    checks = []

    def judged(codes: np.ndarray, labels: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        return _judge(pipeline, system.prior, codes, labels, first, options, tolerance)

    for name, options in kinds.items():
        codes = pipeline.generate(labels, seed=SEED, **options).codes
        far, _ = judged(codes, labels, 0)
        checks.append(at_most("generate", f"{name}: tokens outside the margin rule", far.sum(), 0))
    checks += check_repeats(pipeline, codes, labels, options, judged)
    return [*checks, *_check_blended(pipeline, system, labels)]


def _check_blended(pipeline: Pipeline, system: System, labels: np.ndarray) -> list[Check]:
    """`more_smooth`: the logits at the maps of the plan, each map given its logits, and the images of the last ones."""
    prior, options = system.prior, {"temperature": 1.0, "top_k": pipeline.codebook_size // 2, "top_p": 1.0}
    chosen = pipeline.options(**options, guidance_scale=_SCALE, more_smooth=1)
    scales = scale_outputs(pipeline, np.full((len(labels), *pipeline.grid), -1), labels, SEED, chosen)
    logits = torch.cat([torch.from_numpy(outputs["logits"]) for outputs in scales], 1)
    maps = [torch.from_numpy(outputs["present_map"]) for outputs in scales]
    inputs = torch.cat([prior.quantizer.reduced(m, scale) for scale, m in enumerate(maps[:-1], 1)], 1)
    expected = _guided(prior, inputs, labels, _SCALE)
    checks = compare_logits("blended maps, guided", logits, expected, limits(pipeline.manifest, "step"))

    differences, whole = [], torch.zeros_like(maps[0])
    for scale, (own, found) in enumerate(zip(logits.split(prior.quantizer.sizes, 1), maps, strict=True)):
        noise = torch.from_numpy(noise_of(SEED, range(len(labels)), scale, own.shape[1:])).flatten(0, 1)
        rows = len(noise)
        top_k = torch.full((rows,), options["top_k"])
        share = torch.full((rows,), scale / max(prior.config.depth - 1, 1))
        kept = truncate(own.flatten(0, 1), torch.ones(rows), top_k, torch.ones(rows))
        vectors = blended(kept, noise, share, prior.quantizer.codebook).unflatten(0, own.shape[:2])
        whole = whole + prior.quantizer.enlarged(vectors, scale)
        differences.append(float((found - whole).abs().max()))
        whole = found
    largest = max(float(each.abs().max()) for each in maps)
    checks.append(at_most("blend", "largest difference of maps", max(differences), _BLENDED * largest))

    images = pipeline.generate(labels, seed=SEED, **chosen).images
    pixels = system.tokenizer.reconstruct(maps[-1].unflatten(1, (prior.config.sides[-1], -1)))
    grey = channels_last(to_uint8(pixels, system.tokenizer.config.pixel_range)).numpy()
    return [*checks, *compare_images("reconstruct", images, grey, limits(pipeline.manifest, "reconstruct"))]


def _logits(prior: VAR, codes: np.ndarray, labels: np.ndarray, scale: float) -> Tensor:
    """Logits of the reference [B, N, K] at codes; the guidance scale rises from 1."""
    return _guided(prior, prior.quantizer.inputs(torch.from_numpy(codes)), labels, scale)


def _guided(prior: VAR, inputs: Tensor, labels: np.ndarray, scale: float) -> Tensor:
    """The same from averaged maps; see `VAR.logits_at`."""
    own, none = torch.from_numpy(labels), torch.full((len(labels),), prior.config.classes)
    share = prior.scales[:, None] / max(prior.config.depth - 1, 1)
    conditional, unconditional = prior.logits_at(inputs.repeat(2, 1, 1), torch.cat([own, none])).chunk(2)
    return guided_at(conditional, unconditional, scale, share)


def _judge(
    pipeline: Pipeline,
    prior: VAR,
    codes: np.ndarray,
    labels: np.ndarray,
    first: int,
    options: dict[str, Any],
    tolerance: float | None,
) -> tuple[np.ndarray, np.ndarray]:
    """`judge` for generated codes, given those of coarser scales; both results have the shape of the codes.

    Without a tolerance the logits are those of the plan itself.
    """
    scale = options["guidance_scale"]
    if tolerance is None:
        logits = torch.from_numpy(scale_logits(pipeline, codes, labels, guidance_scale=scale)).flatten(0, 1)
        tolerance = own_tolerance(logits)
    else:
        logits = _logits(prior, codes, labels, scale).flatten(0, 1)
        tolerance *= 2 * scale if scale != 1 else 1  # guidance amplifies errors of logits
    images = range(first, first + len(codes))
    drawn = np.concatenate(
        [noise_of(SEED, images, s, (n, logits.shape[1])) for s, n in enumerate(prior.quantizer.sizes)], 1
    )
    noise = torch.from_numpy(drawn).flatten(0, 1)
    far, close = judge(logits, noise, torch.from_numpy(codes).flatten(), options, tolerance)
    return far.view(codes.shape).numpy(), close.view(codes.shape).numpy()
