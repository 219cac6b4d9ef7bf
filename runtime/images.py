"""Images in and out of files."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import TiffImageFile

from vqdeploy.errors import ArtifactError, shown
from vqdeploy.files import check_regular, replacing_file, to_json

GREY = 128
"""What is shown in place of what is unknown."""

MOST_PIXELS = 2**27
"""Of an image that is read: a file of a few bytes may say that it is larger than the memory."""

_FORMATS = (
    "PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "DDS", "ICO", "PCX", "SGI",
)  # fmt: skip
"""What is read. Pillow knows more, but runs another program for EPS, and only names others, such as HDF5."""

_BITS_PER_SAMPLE = 258  # a tag of TIFF
_FRAME_MS, _LAST_FRAME_MS = 250, 1500


def read(path: Path, side: int | None = None, width: int | None = None) -> np.ndarray:
    """An image file as training, `run` and the metrics see it, uint8 [H, W, 3].

    It is turned upright as its EXIF data say, 16-bit grey becomes 8-bit grey, and what is transparent lies on white.

    Args:
        path: The file; its content decides about the format.
        side: Resize the centre square to this many pixels; None for the whole image.
        width: Of the result, where it is no square: its `side` is the height then.

    Raises:
        VqdeployError: The file does not exist.
        ArtifactError: It is damaged, no image, too large, or of a mode whose range is not known.
    """
    image = open_image(path)
    if side is None or width in (None, side):
        return np.asarray(image if side is None else square(image, side))
    return np.asarray(ImageOps.fit(image, (width, side), Image.Resampling.LANCZOS))


def read_mask(path: Path, side: int) -> np.ndarray:
    """Where the centre square of an image file is lighter than middle grey, bool [side, side]; transparent is black.

    Raises:
        VqdeployError: The file does not exist.
        ArtifactError: As for `read`.
    """
    return np.asarray(square(open_image(path, background=0).convert("L"), side)) > 127


def open_image(path: Path, background: int = 255) -> Image.Image:
    """The image of `read` as RGB, before it is cut; what is transparent lies on a grey level, white by default."""
    path = Path(path)
    check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(path, formats=_formats()) as image:
                _check_size(image)
                bits, upright = _bits(image), ImageOps.exif_transpose(image)
                return _on_background(upright if bits == 8 else _eight_bits(upright, bits), background)
    except Exception as error:  # Pillow raises what its decoders raise
        raise ArtifactError(f"{path} is not an image that can be read ({_reason(error)})") from error


def square(image: Image.Image, side: int, share: float = 1.0, x: float = 0.5, y: float = 0.5) -> Image.Image:
    """A square of an image, resized to `side` pixels; the largest in the centre by default.

    Args:
        image: Where from.
        side: Height and width of the result.
        share: Side of the square, as a share of the shorter side of the image.
        x: Where it lies between the left and the right border, 0..1.
        y: Where it lies between the upper and the lower border, 0..1.
    """
    length = share * min(image.size)
    left, top = x * (image.width - length), y * (image.height - length)
    return image.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + length, top + length))


def suffixes() -> frozenset[str]:
    """The endings of image files that can be read, such as `.png`."""
    formats = _formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _check_size(image: Image.Image) -> None:
    """Refuses what its header says is too large, before anything is unpacked."""
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")


def _bits(image: Image.Image) -> int:
    """Bits of a pixel's channel, where the mode has a range that says what is black and what is white."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise ValueError(f"its mode {image.mode} has no known range; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return 8
    return int(image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0]) if isinstance(image, TiffImageFile) else 16


def _eight_bits(image: Image.Image, bits: int) -> Image.Image:
    """Grey of more than 8 bits as 8-bit grey; Pillow would cut it off at 255."""
    values, most = np.asarray(image).astype(np.uint32), 2**bits - 1
    grey = Image.fromarray(((values * 255 + most // 2) // most).clip(0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _on_background(image: Image.Image, grey: int) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (grey, grey, grey, 255)), image).convert("RGB")


def _reason(error: Exception) -> str:
    """What is wrong with an image, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "its format is not known, or its first bytes are damaged"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has too many pixels, more than {MOST_PIXELS:,}"
    return shown(str(error) or type(error).__name__)


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
