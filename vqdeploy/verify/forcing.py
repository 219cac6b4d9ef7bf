"""Samplers that are made to draw given codes, so that their logits are those of teacher forcing."""

from collections.abc import Iterable, Sequence

import numpy as np

from vqdeploy.runtime import Pipeline
from vqdeploy.runtime.noise import Draw, Key
from vqdeploy.runtime.sampler import Item

_FORCE = 1e9  # noise beside which no logit counts


def forced_logits(pipeline: Pipeline, codes: np.ndarray, known: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logits of each engine call that draws a place, while noise forces the sampler to the given codes.

    Args:
        pipeline: A plan whose sampler draws in raster order.
        codes: Those to draw [B, places, Q].
        known: Those that are known beforehand [B, *grid], -1 elsewhere; the same places for every image.
        labels: Labels [B].

    Returns:
        [B, places that are drawn, Q, K].
    """
    with pipeline.sampler(len(codes)) as sampler:
        sampler.draw = _drawing(codes)
        options = untouched_options(pipeline)
        for slot, label in enumerate(labels):
            sampler.admit(slot, Item(known[slot], int(label), 0, slot, options))
        collected = []
        while sampler.left(0):
            sampler.step()
            collected.append(np.array(sampler.last.outputs["logits"]))
    return np.stack(collected, 1)


def untouched_options(pipeline: Pipeline) -> dict[str, object]:
    """Sampling options that change no logit."""
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance_scale": 1.0}
    return pipeline.options(**{name: value for name, value in neutral.items() if name in pipeline.sampling.options})


def _drawing(codes: np.ndarray) -> Draw:
    """Noise by which draw t of image i takes codes[i, t]."""

    def draw(keys: Sequence[Key], rows: Iterable[np.ndarray]) -> None:
        for (_, image, place), row in zip(keys, rows, strict=True):
            row[...] = 0
            row[np.arange(len(row)), codes[image, place]] = _FORCE

    return draw
