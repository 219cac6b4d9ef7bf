"""Random numbers that depend on the seed, the image and the step, and on nothing else."""

import numpy as np

_ONE = np.uint32(0x3F800000)  # the bits of 1.0: with 23 random bits below them, a number in [1, 2)


def gumbel(seed: int, images: np.ndarray, step: int, out: np.ndarray) -> None:
    """Fills `out` [B, ...] float32 with standard Gumbel noise, -log(-log(u)).

    Philox is keyed by (seed, image index) and its counter starts at the step, so that image i gets the same noise
    alone, in any batch, and on any backend. u is an odd multiple of 2^-24, never 0 or 1.

    Args:
        seed: At least 0.
        images: Index of each image [B].
        step: Index of the engine call.
        out: Where the noise goes, contiguous.
    """
    for row, image in zip(out.reshape(len(out), -1), images, strict=True):
        bits = np.random.Philox(key=[seed, int(image)], counter=[0, 0, 0, step])
        # Raw words, in place: Generator.random takes twice as long for float32.
        words = row.view(np.uint32)
        np.right_shift(bits.random_raw(-(-row.size // 2)).view(np.uint32)[: row.size], np.uint32(9), out=words)
        np.bitwise_or(words, _ONE, out=words)
        row -= np.float32(1 - 2**-24)
        for _ in range(2):
            np.log(row, out=row)
            np.negative(row, out=row)
