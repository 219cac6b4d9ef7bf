"""Logits of priors at given codes, to compare plans: teacher forcing, through noise that selects these codes."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vqdeploy.runtime.noise import Draw, Key
from vqdeploy.runtime.pipeline import Pipeline, batches
from vqdeploy.runtime.sampler import Item

_IMAGES, _CODES = 4, 1000
_FORCE = 1e9  # noise that dominates all logits


def images_to_compare(codes: int) -> int:
    """How many images with this many codes each to compare distributions at, so that a single code counts little."""
    return max(_IMAGES, math.ceil(_CODES / codes))


def partly_masked(codes: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Codes int64 [B, h, w, Q] with `size` for random ones: a fifth of the first image to nearly all of the last."""
    shares = np.linspace(0.2, 0.95, len(codes))[:, None, None, None]
    masked = rng.random(codes.shape) < shares
    masked[:, 0, 0, 0] = True  # an image without any takes no step, and has no logits
    return np.where(masked, size, codes)


def forced_logits(
    pipeline: Pipeline, codes: np.ndarray, known: np.ndarray, conditions: np.ndarray, **options: object
) -> np.ndarray:
    """Logits of each engine call, while noise forces the sampler to draw the given codes, batch by batch.

    Args:
        pipeline: A plan whose sampler draws in raster order.
        codes: Codes to draw [B, positions, Q].
        known: Codes known in advance [B, *grid], -1 elsewhere; at the same positions for all images.
        conditions: Labels [B], or texts [B, length].
        **options: Sampling options, such as a guidance scale.

    Returns:
        float32 [B, drawn positions, Q, K].

    Raises:
        VqdeployError: An argument is malformed or out of range.
    """
    chosen = untouched_options(pipeline) | options
    parts = batches(len(codes), pipeline.call_images(_guided(chosen)))
    return np.concatenate(
        [_forced_batch(pipeline, codes[part], known[part], conditions[part], chosen) for part in parts]
    )


def _guided(options: dict[str, Any]) -> bool:
    return bool(options.get("guidance_scale", 1.0) != 1)


def _forced_batch(
    pipeline: Pipeline, codes: np.ndarray, known: np.ndarray, conditions: np.ndarray, options: dict[str, Any]
) -> np.ndarray:
    with pipeline.sampler(len(codes), _guided(options)) as sampler:
        sampler.draw = _drawing(codes)
        for slot, condition in enumerate(conditions):
            sampler.admit(slot, Item(known[slot], condition, 0, slot, options))
        collected = []
        while sampler.left(0):
            sampler.step()
            collected.append(np.array(sampler.last.outputs["logits"]))
    return np.stack(collected, 1)


def masked_logits(pipeline: Pipeline, codes: np.ndarray, labels: np.ndarray, **options: object) -> np.ndarray:
    """Logits of one step of a masked prior.

    Args:
        pipeline: A plan with a masked prior.
        codes: Codes int64 [B, h, w, Q]; the codebook size where they are masked, at least one of each image.
        labels: Labels [B].
        **options: Sampling options, such as a guidance scale.

    Returns:
        float32 [B, h, w, Q, K].
    """
    chosen = untouched_options(pipeline) | {"steps": 1, "schedule": "linear"} | options
    found = []
    with pipeline.sampler(1, _guided(chosen)) as sampler:
        for image, (known, label) in enumerate(zip(codes, labels, strict=True)):
            open_codes = np.where(known < pipeline.codebook_size, known, -1)
            sampler.admit(0, Item(open_codes, int(label), 0, image, chosen))
            sampler.step()
            found.append(np.array(sampler.last.outputs["logits"]))
            sampler.release(0)
    return np.concatenate(found)


def scale_logits(pipeline: Pipeline, codes: np.ndarray, labels: np.ndarray, **options: object) -> np.ndarray:
    """Logits of a next-scale prior, each scale given the coarser ones.

    Args:
        pipeline: A plan with a next-scale prior.
        codes: Codes [B, N].
        labels: Labels [B].
        **options: Sampling options, such as a guidance scale.

    Returns:
        float32 [B, N, K].
    """
    all_but_one = codes.copy()
    all_but_one[:, -1] = -1  # so that every call is made
    scales = scale_outputs(pipeline, all_but_one, labels, 0, untouched_options(pipeline) | options)
    return np.concatenate([outputs["logits"] for outputs in scales], 1)


def scale_outputs(
    pipeline: Pipeline, known: np.ndarray, labels: np.ndarray, seed: int, options: dict[str, Any]
) -> list[dict[str, np.ndarray]]:
    """The outputs `logits` and `present_map` of each engine call of a next-scale prior, for images one by one.

    Args:
        pipeline: A plan with a next-scale prior.
        known: Codes [B, N], -1 for those to draw; at least the last.
        labels: Labels [B].
        seed: Seed of the noise.
        options: Sampling options, from `Pipeline.options`.

    Returns:
        For each scale, arrays of all images [B, ...] by name.
    """
    names, images = ("logits", "present_map"), []
    with pipeline.sampler(1, _guided(options)) as sampler:
        for image, (codes, label) in enumerate(zip(known, labels, strict=True)):
            sampler.admit(0, Item(codes, int(label), seed, image, options))
            calls = []
            while sampler.left(0):
                sampler.step()
                calls.append({name: np.array(sampler.last.outputs[name]) for name in names})
            sampler.release(0)
            images.append(calls)
    return [
        {name: np.concatenate([call[name] for call in calls]) for name in names} for calls in zip(*images, strict=True)
    ]


def untouched_options(pipeline: Pipeline) -> dict[str, Any]:
    """Sampling options that change no logit."""
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance_scale": 1.0, "more_smooth": 0}
    return pipeline.options(**{name: value for name, value in neutral.items() if name in pipeline.sampling.options})


def _drawing(codes: np.ndarray) -> Draw:
    """Noise that makes draw t of image i take codes[i, t]."""

    def draw(keys: Sequence[Key], rows: Iterable[np.ndarray]) -> None:
        for (_, image, position), row in zip(keys, rows, strict=True):
            row[...] = 0
            row[np.arange(len(row)), codes[image, position]] = _FORCE

    return draw
