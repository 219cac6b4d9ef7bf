"""Checks of masked priors: the logits of a step, and every draw and every choice of whole generations."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqdeploy.reference import guided_logits
from vqdeploy.reference.schedules import choice_weight, halton_ranks, masked_counts
from vqdeploy.runtime import Pipeline, Step
from vqdeploy.runtime.forcing import images_to_compare, masked_logits, partly_masked
from vqdeploy.runtime.noise import of_images as noise_of
from vqdeploy.systems import System
from vqdeploy.verify.checks import (
    IMAGES,
    SEED,
    Check,
    at_most,
    compare_distributions,
    compare_logits,
    judge,
    limits,
    own_tolerance,
    tolerance_of,
)

_SCALE = 3.0  # guidance scale
_STEPS = 6
_ONE_LABEL = "one label"


def check_logits(pipeline: Pipeline, system: System, rng: np.random.Generator) -> list[Check]:
    """Logits of partly masked codes, with one label and with guidance."""
    batch, config = 2, system.prior.config
    codes = rng.integers(0, config.codebook_size, (batch, *config.grid))
    codes[rng.random(codes.shape) < np.array([0.3, 0.9])[:, None, None, None]] = config.codebook_size
    labels = rng.integers(0, config.classes, batch)
    scales = [(_ONE_LABEL, 1.0), *([("guidance", _SCALE)] if config.null_label else [])]
    allowed = limits(pipeline.manifest, "step")

    def both(codes: np.ndarray, labels: np.ndarray, scale: float) -> tuple[Tensor, Tensor]:
        """The logits of the plan and of the reference."""
        logits = torch.from_numpy(masked_logits(pipeline, codes, labels, **_guidance(pipeline, scale)))
        return logits, guided_logits(system.prior, torch.from_numpy(codes), torch.from_numpy(labels), scale)

    checks = []
    for name, scale in scales:
        checks += compare_logits(name, *both(codes, labels, scale), allowed)
    labels = pipeline.condition.examples(images_to_compare(math.prod(pipeline.grid)))
    codes = partly_masked(pipeline.generate(labels, seed=SEED).codes, config.codebook_size, rng)
    for name, scale in scales:
        checks += compare_distributions(f"{name}, drawn codes", *both(codes, labels, scale), allowed, scale)
    return checks


def _guidance(pipeline: Pipeline, scale: float) -> dict[str, float]:
    """The option for a guidance scale, if the plan has guidance."""
    return {} if pipeline.sampling.no_label is None else {"guidance_scale": scale}


class _Step(NamedTuple):
    """One step of a generation: input codes, drawn codes [B, h, w, Q], and the mask for the next step."""

    codes: Tensor
    given: Tensor
    drawn: Tensor
    masked: Tensor


def check_generation(pipeline: Pipeline, system: System, logits: list[Check]) -> list[Check]:
    """Whole generations by the margin rule; an image alone against the same image in a batch.

    `logits` are the checks of `check_logits`, which determine the margin; see `own_tolerance`.
    """
    one_label = [check for check in logits if check.metric.startswith(_ONE_LABEL)]  # without guidance
    tolerance = None if pipeline.quantized else tolerance_of(one_label)
    whole = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "steps": _STEPS, "choice_temperature": 4.5}
    cut = {"temperature": 0.8, "top_k": pipeline.codebook_size // 4, "top_p": 0.9}
    kinds: dict[str, dict[str, Any]] = {
        "by order, guided": whole | {"schedule": "halton"} | _guidance(pipeline, _SCALE),
        "truncated, guided": whole | cut | {"schedule": "linear"} | _guidance(pipeline, _SCALE),
        "full distribution": whole | {"schedule": "cosine"} | _guidance(pipeline, 1.0),
    }
    labels = [i % pipeline.classes for i in range(IMAGES)]
    checks = []
    for name, options in kinds.items():
        steps = _trace(pipeline, labels, 0, options)
        far, misplaced, _ = _judge(pipeline, system, steps, labels, 0, options, tolerance)
        checks.append(at_most("generate", f"{name}: tokens outside the margin rule", far, 0))
        checks.append(at_most("generate", f"{name}: codes masked against the rule", misplaced, 0))
    again = _trace(pipeline, labels, 0, options)
    differing = sum(int((a.drawn != b.drawn).sum()) for a, b in zip(steps, again, strict=True))
    checks.append(at_most("generate", "codes that differ in a second run", differing, 0))

    chosen = IMAGES - 2
    alone = _trace(pipeline, [labels[chosen]], chosen, options)
    far, misplaced, close = _judge(pipeline, system, alone, [labels[chosen]], chosen, options, tolerance)
    unexcused = _first_difference(steps, alone, chosen, close)
    checks.append(at_most("generate", "image alone: codes outside the margin rule", far + misplaced + unexcused, 0))
    return checks


def _trace(pipeline: Pipeline, labels: list[int], first: int, options: dict[str, Any]) -> list[_Step]:
    size = pipeline.codebook_size
    calls: dict[range, list[_Step]] = {}  # large requests are split

    def record(step: Step) -> None:
        steps, seen = calls.setdefault(step.images, []), step.codes
        open_codes = codes = torch.full(seen.shape, size)
        if steps:
            codes = torch.where(steps[-1].masked, size, steps[-1].drawn)
        given = open_codes if options["schedule"] == "halton" else codes
        drawn, masked = torch.from_numpy(np.where(seen < 0, -1 - seen, seen)), torch.from_numpy(seen < 0)
        steps.append(_Step(codes, given, drawn, masked))

    pipeline.generate(labels, seed=SEED, first_image=first, callback=record, **options)
    return [_Step(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*calls.values(), strict=True)]


def _judge(
    pipeline: Pipeline,
    system: System,
    steps: list[_Step],
    labels: list[int],
    first: int,
    options: dict[str, Any],
    tolerance: float | None,
) -> tuple[int, int, list[Tensor]]:
    """Judges each step by the margin rule, given its input codes; without a tolerance by the logits of the plan itself.

    Returns:
        The number of codes that the reference would clearly not have drawn, the number of codes whose mask is clearly
        wrong, and for each step the close calls of either kind, bool [B, h, w, Q].
    """
    scale = options.get("guidance_scale", 1.0)
    shape = steps[0].codes.shape
    counts = masked_counts(options["schedule"], steps[0].codes[0].numel(), len(steps))
    far, misplaced, close = 0, 0, []
    for i, step in enumerate(steps):
        if tolerance is None:
            own = masked_logits(pipeline, step.codes.numpy(), np.array(labels), **_guidance(pipeline, scale))
            logits = torch.from_numpy(own).flatten(0, -2)
            slack = own_tolerance(logits)
        else:
            logits = guided_logits(system.prior, step.codes, torch.tensor(labels), scale).flatten(0, -2)
            slack = tolerance * 2 * scale  # guidance amplifies errors of logits
        heat_slack = 2 * slack / options["temperature"] + 1e-5
        known = step.given < logits.shape[1]
        noise = _noise((*shape, logits.shape[1]), first, 2 * i).flatten(0, -2)
        wrong, near = judge(logits, noise, step.drawn.flatten(), options, slack)
        far += int((wrong.view(shape) & ~known).sum() + (step.drawn != step.given)[known].sum())
        close.append(near.view(shape) & ~known)
        if i + 1 < len(steps):
            confidence = _confidence(logits / options["temperature"], step, i, first, options).masked_fill(known, 1e30)
            left = torch.minimum(torch.tensor(counts[i]), (~known).flatten(1).sum(1) - 1).clamp(min=1)
            cut = confidence.flatten(1).sort(1).values.gather(1, left[:, None]).view(-1, 1, 1, 1)
            close[-1] |= ((confidence - cut).abs() <= heat_slack) & ~known
            misplaced += int((step.masked & (confidence > cut + heat_slack)).sum())
            misplaced += int((~step.masked & (confidence < cut - heat_slack)).sum())
            misplaced += int((step.masked.flatten(1).sum(1) > left).sum())
        else:
            misplaced += int(step.masked.sum())
    return far, misplaced, close


def _confidence(scaled: Tensor, step: _Step, index: int, first: int, options: dict[str, Any]) -> Tensor:
    """Confidence of each drawn code [B, h, w, Q], including the choice noise."""
    shape = step.codes.shape
    if options["schedule"] == "halton":
        return -halton_ranks(shape[1:]).expand(shape)
    likelihood = scaled.log_softmax(-1).gather(1, step.drawn.view(-1, 1)).view(shape)
    weight = choice_weight(options["choice_temperature"], index, options["steps"])
    return likelihood + weight * _noise(shape, first, 2 * index + 1)


def _noise(shape: tuple[int, ...], first: int, index: int) -> Tensor:
    return torch.from_numpy(noise_of(SEED, range(first, first + shape[0]), index, shape[1:]))


def _first_difference(steps: list[_Step], alone: list[_Step], image: int, close: list[Tensor]) -> int:
    """Codes that differ between an image alone and in a batch at the first such step, without close calls."""
    for together, single, excused in zip(steps, alone, close, strict=True):
        differing = (together.drawn[image] != single.drawn[0]) | (together.masked[image] != single.masked[0])
        if differing.any():
            return int((differing & ~excused[0]).sum())
    return 0
