"""Teacher forcing of samplers, through noise that selects the given codes."""

from collections.abc import Iterable, Sequence

import numpy as np

from vqdeploy.runtime import Pipeline
from vqdeploy.runtime.noise import Draw, Key
from vqdeploy.runtime.sampler import Item

_FORCE = 1e9  # noise that dominates all logits


def forced_logits(pipeline: Pipeline, codes: np.ndarray, known: np.ndarray, conditions: np.ndarray) -> np.ndarray:
    """Logits of each engine call, while noise forces the sampler to draw the given codes.

    Args:
        pipeline: A plan whose sampler draws in raster order.
        codes: Codes to draw [B, positions, Q].
        known: Codes known in advance [B, *grid], -1 elsewhere; at the same positions for all images.
        conditions: Labels [B], or texts [B, length].

    Returns:
        Float32 [B, drawn positions, Q, K].
    """
    with pipeline.sampler(len(codes)) as sampler:
        sampler.draw = _drawing(codes)
        options = untouched_options(pipeline)
        for slot, condition in enumerate(conditions):
            sampler.admit(slot, Item(known[slot], condition, 0, slot, options))
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
    """Noise that makes draw t of image i take codes[i, t]."""

    def draw(keys: Sequence[Key], rows: Iterable[np.ndarray]) -> None:
        for (_, image, place), row in zip(keys, rows, strict=True):
            row[...] = 0
            row[np.arange(len(row)), codes[image, place]] = _FORCE

    return draw
