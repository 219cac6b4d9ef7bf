"""Reads and writes image files."""

import io
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import TiffImageFile

from vqdeploy.errors import ArtifactError, shown
from vqdeploy.files import check_regular, replacing_file, to_json

GREY = 128
"""Grey level that stands for unknown pixels."""

PREVIEW_VEIL = 0.75
"""Opacity of the grey over codes that are not final: tentative ones stay visible."""

MOST_PIXELS = 2**27
"""Most pixels of an input image: a small file may declare a size beyond the memory."""

_FORMATS = (
    "PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "DDS", "PCX", "SGI",
)  # fmt: skip
"""Supported formats. Pillow has more, but runs an external program for EPS and cannot decode others, such as HDF5."""

_BITS_PER_SAMPLE = 258  # a tag of TIFF
_FRAME_MS, _LAST_FRAME_MS = 250, 1500


def read(path: Path, side: int | None = None, width: int | None = None) -> np.ndarray:
    """An image file as training, `run` and the metrics see it, uint8 [H, W, 3].

    The EXIF orientation is applied, 16-bit grey becomes 8-bit grey, and transparent pixels are composited on white.

    Args:
        path: The file; its content determines the format.
        side: Resize the centre square to this many pixels; None for the whole image.
        width: Width of a result that is not square; `side` is its height then.

    Raises:
        VqdeployError: The file does not exist.
        ArtifactError: It is damaged, not an image, too large, or of a mode whose range is unknown.
    """
    return _resized(open_image(path), side, width)


def read_bytes(
    content: bytes, name: str, side: int | None = None, width: int | None = None, most: int | None = None
) -> np.ndarray:
    """The content of an image file as `read` gives it, uint8 [H, W, 3]; `name` and `most` are as for `decode`.

    Raises:
        ArtifactError: As for `read`.
    """
    return _resized(on_background(decode(io.BytesIO(content), name, most)), side, width)


def _resized(image: Image.Image, side: int | None, width: int | None) -> np.ndarray:
    return np.asarray(image) if side is None else fitted(image, side, width or side)


def fitted(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The centre of an image, resized to uint8 [height, width, channels], or [height, width] for grey."""
    if height == width:
        return np.asarray(square(image, height))
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def read_mask(path: Path, side: int) -> np.ndarray:
    """Where the centre square of an image file is lighter than grey level 127, bool [side, side]; transparent is black.

    Raises:
        VqdeployError: The file does not exist.
        ArtifactError: As for `read`.
    """
    return light(open_image(path, background=0), side, side)


def light(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Where the centre of an image is lighter than grey level 127, bool [height, width]."""
    return fitted(image.convert("L"), height, width) > 127


def open_image(path: Path, background: int = 255) -> Image.Image:
    """The image of `read` as RGB, before it is cropped; transparent pixels are composited on a grey level.

    Raises:
        VqdeployError: The file does not exist.
        ArtifactError: As for `read`.
    """
    path = Path(path)
    check_regular(path)
    return on_background(decode(path, path), background)


def decode(file: Path | BinaryIO, name: object, most: int | None = None) -> Image.Image:
    """An image upright and with 8 bits a channel: RGBA if it has transparency, else RGB.

    Args:
        file: The file; its content determines the format.
        name: What errors call it.
        most: Most pixels that are decoded, `MOST_PIXELS` by default.

    Raises:
        ArtifactError: As for `read`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, for which our limit is lower, and of what decoders mend
            with Image.open(file, formats=_formats()) as image:
                _check_size(image, most or MOST_PIXELS)
                bits, upright = _bits(image), ImageOps.exif_transpose(image)
                upright = upright if bits == 8 else _eight_bits(upright, bits)
                return upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    except Exception as error:  # decoders of Pillow raise anything
        raise ArtifactError(
            f"{name} is not an image that can be read ({_reason(error, most or MOST_PIXELS)})"
        ) from error


def on_background(image: Image.Image, grey: int = 255) -> Image.Image:
    """An image RGB or RGBA as RGB, composited on a grey level."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (grey, grey, grey, 255)), image).convert("RGB")


def square(image: Image.Image, side: int, share: float = 1.0, x: float = 0.5, y: float = 0.5) -> Image.Image:
    """A square of an image, resized to `side` pixels; the largest in the centre by default.

    Args:
        image: The image.
        side: Height and width of the result in pixels.
        share: Side of the square, as a fraction of the shorter side of the image.
        x: Position between the left border (0) and the right one (1).
        y: Position between the upper border (0) and the lower one (1).
    """
    length = share * min(image.size)
    left, top = x * (image.width - length), y * (image.height - length)
    return image.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + length, top + length))


def suffixes() -> frozenset[str]:
    """The file extensions of supported formats, such as `.png`."""
    formats = _formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _check_size(image: Image.Image, most: int) -> None:
    """Rejects an image whose header declares too many pixels, before it is decoded."""
    if image.width * image.height > most:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than {most:,}")


def _bits(image: Image.Image) -> int:
    """Bits per channel, for modes with a defined black and white."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise ValueError(f"its mode {image.mode} has no known range; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return 8
    return int(image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0]) if isinstance(image, TiffImageFile) else 16


def _eight_bits(image: Image.Image, bits: int) -> Image.Image:
    """Grey of more than 8 bits as 8-bit grey; Pillow would clip it at 255."""
    values, most = np.asarray(image).astype(np.uint32), 2**bits - 1
    grey = Image.fromarray(((values * 255 + most // 2) // most).clip(0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _reason(error: Exception, most: int) -> str:
    """Why an image cannot be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "its format is unknown, or its header is damaged"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has too many pixels, more than {most:,}"
    return shown(str(error) or type(error).__name__)


def write_grid(path: Path, images: np.ndarray, columns: int, note: dict[str, Any], gap: int = 2) -> None:
    """Writes images uint8 [N, H, W, 3] as one PNG, row by row, with `note` as JSON in its text chunk `vqdeploy`.

    Raises:
        VqdeployError: The file cannot be written.
    """
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
    """Blends images uint8 [N, H, W, 3] with grey by the fraction of unknown codes bool [N, h, w, Q] of each cell."""
    side = images.shape[1] // unknown.shape[1]
    share = opacity * np.kron(unknown.mean(3), np.ones((1, side, side)))[..., None]
    return (images * (1 - share) + GREY * share).round().astype(np.uint8)


def write_frames(path: Path, frames: np.ndarray, note: dict[str, Any]) -> None:
    """Writes frames uint8 [N, H, W, 3] as an animation when the name ends in `.gif`, else side by side as a PNG.

    Raises:
        VqdeployError: The file cannot be written.
    """
    if path.suffix.lower() != ".gif":
        write_grid(path, frames, columns=len(frames), note=note)
        return
    first, *rest = (Image.fromarray(frame) for frame in frames)
    durations = [_FRAME_MS] * len(rest) + [_LAST_FRAME_MS]
    with replacing_file(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)
