"""Images in and out of files."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import replacing_file, to_json

GREY = 128
"""What is shown in place of what is unknown."""

_FRAME_MS, _LAST_FRAME_MS = 250, 1500


def read(path: Path, side: int | None = None) -> np.ndarray:
    """An image file as uint8 [H, W, 3]; with `side`, its centre square resized to that many pixels.

    Raises:
        VqdeployError: The file does not exist.
        ArtifactError: It is not an image.
    """
    image = _open(path).convert("RGB")
    return np.asarray(image if side is None else _square(image, side))


def read_mask(path: Path, side: int) -> np.ndarray:
    """Where the centre square of an image file is lighter than middle grey, bool [side, side]; transparent is black.

    Raises:
        VqdeployError: The file does not exist.
        ArtifactError: It is not an image.
    """
    image = _open(path).convert("RGBA")
    image.paste((0, 0, 0, 255), mask=image.getchannel("A").point(lambda alpha: 255 - alpha))
    return np.asarray(_square(image.convert("L"), side)) > 127


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return _eight_bits(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise VqdeployError(f"{path} does not exist") from error
    except Exception as error:  # Pillow raises what its decoders raise
        raise ArtifactError(f"{path} is not an image that can be read") from error


def _square(image: Image.Image, side: int) -> Image.Image:
    square = min(image.size)
    left, top = (image.width - square) // 2, (image.height - square) // 2
    return image.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + square, top + square))


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; Pillow would clip it to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))


def write_grid(path: Path, images: np.ndarray, columns: int, note: dict[str, Any], gap: int = 2) -> None:
    """Writes images uint8 [N, H, W, 3] as one PNG, row by row, with `note` as JSON in its text chunk `vqdeploy`."""
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    text = PngInfo()
    text.add_text("vqdeploy", to_json(note))
    with replacing_file(path) as file:
        Image.fromarray(sheet).save(file, format="PNG", pnginfo=text)


def veil(images: np.ndarray, unknown: np.ndarray, opacity: float = 1.0) -> np.ndarray:
    """Images uint8 [N, H, W, 3] under grey where their codes [N, h, w, Q] are unknown, by the share that is."""
    side = images.shape[1] // unknown.shape[1]
    share = opacity * np.kron(unknown.mean(3), np.ones((1, side, side)))[..., None]
    return (images * (1 - share) + GREY * share).round().astype(np.uint8)


def write_frames(path: Path, frames: np.ndarray, note: dict[str, Any]) -> None:
    """Writes frames uint8 [N, H, W, 3] as an animation when the name ends in `.gif`, else side by side as a PNG."""
    if path.suffix.lower() != ".gif":
        write_grid(path, frames, columns=len(frames), note=note)
        return
    first, *rest = (Image.fromarray(frame) for frame in frames)
    durations = [_FRAME_MS] * len(rest) + [_LAST_FRAME_MS]
    with replacing_file(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)
