"""Random numbers that depend on the seed, the image and the step, and on nothing else."""

import numpy as np


def gumbel(seed: int, images: np.ndarray, step: int, out: np.ndarray) -> None:
    """Fills `out` [B, ...] float32 with standard Gumbel noise.

    Philox is keyed by (seed, image index) and its counter starts at the step, so that image i gets the same noise
    alone, in any batch, and on any backend.

    Args:
        seed: At least 0.
        images: Index of each image [B].
        step: Index of the engine call.
        out: Where the noise goes.
    """
    for row, image in zip(out, images, strict=True):
        generator = np.random.Generator(np.random.Philox(key=[seed, int(image)], counter=[0, 0, 0, step]))
        generator.standard_exponential(dtype=np.float32, out=row)
        # An exponential draw can be 0, whose Gumbel value is infinite.
        np.maximum(row, np.float32(1e-30), out=row)
        np.log(row, out=row)
        np.negative(row, out=row)
