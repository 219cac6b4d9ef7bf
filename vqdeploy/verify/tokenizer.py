"""Checks of `encode` and `decode`. Pixel conversion is that of training, independent of the exported layers."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqdeploy.models.pixels import channels_first, channels_last, to_range, to_uint8
from vqdeploy.precision import Limits
from vqdeploy.runtime import Pipeline
from vqdeploy.systems import System
from vqdeploy.verify.checks import IMAGES, Check, at_least, at_most, limits

_LEAST_ERROR = 1e-5  # squared grey levels: bounds the PSNR by 98 dB, as JSON has no infinity


def check_tokenizer(pipeline: Pipeline, system: System, rng: np.random.Generator) -> list[Check]:
    """Checks `encode` by the margin rule, and `decode` from the same codes."""
    tokenizer, shape = system.tokenizer, (IMAGES, *pipeline.grid)
    allowed = limits(pipeline.manifest, "encode")
    drawn = rng.integers(0, pipeline.codebook_size, shape)
    decoded = pipeline.decode(drawn)
    if pipeline.tokenizer.omits_depths:
        decoded[-1:] = pipeline.decode(drawn[-1:], depth=1)
        drawn[-1:] = pipeline.layout.first(drawn[-1:], 1)
    pixel_range = tokenizer.config.pixel_range
    expected = _decoded(system, drawn)

    images = np.concatenate([expected, _smooth_images(pipeline.image_shape[:2], rng)])
    encoded = pipeline.encode(np.concatenate([images, _flat_images(pipeline)]))
    codes, of_images = torch.from_numpy(encoded[: len(images)]), encoded[IMAGES:]  # these unlike random codes
    decoded = np.concatenate([decoded, pipeline.decode(of_images)])
    expected = np.concatenate([expected, _decoded(system, of_images)])
    x = to_range(channels_first(torch.from_numpy(images)), pixel_range)
    agreement = (codes == tokenizer.encode(x)).float().mean()
    far = _far_codes(tokenizer.distances(x, codes), codes, allowed)
    return [
        at_most("encode", "share of codes that differ", 1 - agreement, allowed.codes),
        at_most("encode", "codes outside the margin rule", far, 0),
        *compare_images("decode", decoded, expected, limits(pipeline.manifest, "decode")),
    ]


def _decoded(system: System, codes: np.ndarray) -> np.ndarray:
    pixels = system.tokenizer.decode(torch.from_numpy(codes))
    return channels_last(to_uint8(pixels, system.tokenizer.config.pixel_range)).numpy()


def compare_images(stage: str, images: np.ndarray, expected: np.ndarray, allowed: Limits) -> list[Check]:
    """Compares images uint8 [B, H, W, 3] with those of the reference from the same codes."""
    difference = np.abs(images.astype(int) - expected)
    checks = [at_most(stage, "largest difference in grey levels", difference.max(), allowed.grey_levels)]
    if allowed.psnr:
        error = max((difference**2).mean((1, 2, 3)).max(), _LEAST_ERROR)
        psnr = 10 * np.log10(255**2 / error)
        checks.append(at_least(stage, "PSNR of the worst image in dB, at least the limit", psnr, allowed.psnr))
    return checks


def _smooth_images(size: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    coarse = torch.from_numpy(rng.random((IMAGES, 3, 8, 8), dtype=np.float32))
    smooth = F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _flat_images(pipeline: Pipeline) -> np.ndarray:
    """Black, grey and white."""
    return np.stack([np.full(pipeline.image_shape, level, np.uint8) for level in (0, 128, 255)])


def _far_codes(distances: Tensor, codes: Tensor, allowed: Limits) -> int:
    """Number of codes [B, ...] that are clearly farther than the nearest one, by distances [B, ..., K]."""
    gap = distances.gather(-1, codes[..., None])[..., 0] - distances.amin(-1)
    return int((gap > allowed.distance * distances.amax((0, -1))).sum())
