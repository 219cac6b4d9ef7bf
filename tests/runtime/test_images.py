"""Images read from files: the same pixels for training, `run`, masks and metrics, or a reason."""

import os
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime.images import MOST_PIXELS, read, read_bytes, read_mask, square, suffixes

RNG = np.random.default_rng(0)
GREY, COLOUR, ALPHA = (RNG.integers(0, 256, shape, np.uint8) for shape in ((6, 8), (6, 8, 3), (6, 8)))
ON_WHITE = (COLOUR * (ALPHA[..., None] / 255) + 255 - ALPHA[..., None]).round()


def saved(folder, name, array, mode=None, **options):
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(folder / name, **options)
    return folder / name


def three(grey):
    return np.repeat(grey[..., None], 3, -1)


# Depth


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2"])
def test_sixteen_bit_grey_is_scaled(tmp_path, name):
    assert (read(saved(tmp_path, f"low-{name}", np.full((4, 4), 30000, np.uint16))) == 117).all()
    pixels = read(saved(tmp_path, name, GREY.astype(np.uint16) * 257))
    np.testing.assert_array_equal(pixels, three(GREY))


def test_twelve_bit_grey_is_scaled_by_its_own_range(tmp_path):
    """As cameras and scanners write it into TIFF: two pixels in three bytes."""
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 6)]
    pixels = bytes([0x00, 0x0F, 0xFF, 0x80, 0x01, 0x00])  # 000 fff 800 100
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<I", 14) + pixels
    (tmp_path / "a.tif").write_bytes(header + struct.pack("<H", len(tags)) + entries + bytes(4))
    assert read(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 255, 128, 16]


@pytest.mark.parametrize(
    ("name", "array", "mode"),
    [
        ("f.tif", np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4), "F"),
        ("f.pfm", np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4), "F"),
        ("i.tif", np.arange(16, dtype=np.int32).reshape(4, 4), "I"),
    ],
)
def test_a_mode_without_a_range_is_refused_by_name(tmp_path, name, array, mode):
    for reader in (read, read_mask):
        with pytest.raises(ArtifactError, match=rf"{name} is not .*mode {mode} has no known range"):
            reader(saved(tmp_path, name, array), 4)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB"])
def test_other_modes_are_colours(tmp_path, mode):
    expected = np.asarray(Image.fromarray(COLOUR).convert(mode).convert("RGB"))
    np.testing.assert_array_equal(read(saved(tmp_path, "a.tif", COLOUR, mode)), expected)


# Alpha


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.tga", "a.jp2"])
def test_what_is_transparent_lies_on_white(tmp_path, name):
    pixels = read(saved(tmp_path, name, np.dstack([COLOUR, ALPHA])))
    np.testing.assert_allclose(pixels, ON_WHITE, atol=1)


def test_a_black_drawing_on_nothing(tmp_path):
    drawn = np.zeros((8, 8), np.uint8)
    drawn[2:6, 3:5] = 255
    black, expected = np.zeros_like(drawn), three(255 - drawn)
    palette = Image.fromarray((drawn > 0).astype(np.uint8))
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    palette.save(tmp_path / "p.gif", transparency=0)
    saved(tmp_path, "rgba.png", np.dstack([black, black, black, drawn]))
    Image.merge("LA", [Image.fromarray(black), Image.fromarray(drawn)]).save(tmp_path / "la.png")
    saved(tmp_path, "l.png", (drawn == 0).astype(np.uint8), transparency=1)
    saved(tmp_path, "i16.png", (drawn == 0).astype(np.uint16), transparency=1)
    for name in ("rgba.png", "la.png", "p.png", "p.gif", "l.png", "i16.png"):
        np.testing.assert_array_equal(read(tmp_path / name), expected, err_msg=name)


def test_in_a_mask_what_is_transparent_is_known(tmp_path):
    saved(tmp_path, "m.png", np.dstack([np.full((4, 4, 3), 255, np.uint8), np.eye(4, dtype=np.uint8) * 255]))
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", 4), np.eye(4, dtype=bool))


# Geometry


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_a_turned_photograph_is_read_upright(tmp_path, name):
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turn by a quarter
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :16] = 255
    read_pixels = read(saved(tmp_path, name, pixels, exif=turned))
    assert read_pixels.shape == (48, 16, 3)
    assert read_pixels[:14].min() > 200  # what lay on the left is on top
    assert read_pixels[18:].max() < 50


@pytest.mark.parametrize("size", [(5, 8), (8, 5), (7, 7), (6, 8)])
def test_the_square_lies_in_the_centre(size):
    """To half a pixel: the square of a mirrored image is the mirrored square."""
    image = Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8))
    pixels = np.asarray(square(image, 4)).astype(int)
    mirrored = np.asarray(square(image.transpose(Image.Transpose.ROTATE_180), 4))[::-1, ::-1]
    assert np.abs(pixels - mirrored).max() <= 1


def test_a_part_of_the_square():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    np.testing.assert_array_equal(square(image, 4, 0.5, 1.0, 0.0), np.asarray(image)[:4, 4:])


# Files that are damaged, hostile or something else


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, data=b"", extra=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def bmp(width, height):
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


LONG = zlib.compress(bytes(10**7))
HOSTILE = {
    "bomb.png": png(60000, 60000),
    "wide.png": png(2**31 - 1, 1),
    "just-too-large.png": png(MOST_PIXELS // 1024 + 1, 1024),
    "bomb.bmp": bmp(60000, 60000),
    "bomb.tga": bytes([0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 24, 0]),
    "bomb.ppm": b"P6 60000 60000 255\n",
    "text.png": png(8, 8, bytes(200), chunk(b"zTXt", b"a\0\0" + LONG)),
    "profile.png": png(8, 8, bytes(200), chunk(b"iCCP", b"a\0\0" + LONG)),
    "a.dds": b"DDS |\0\0\0" + b"\xff" * 120,
    "cut.png": png(8, 8, bytes(20)),
    "empty.png": b"",
    "text.jpg": b"no image",
    "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file",
    "a.pdf": b"%PDF-1.4\n",
    "a.h5": b"\x89HDF\r\n\x1a\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_read_has_a_reason_in_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(HOSTILE[name])
    start = time.process_time()
    for reader in (read, read_mask):
        with pytest.raises(ArtifactError, match=rf"{name} is not an image that can be read \(.+\)") as caught:
            reader(tmp_path / name, 8)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < len(str(tmp_path)) + 300
    assert time.process_time() - start < 5  # none of the ten gigabytes was unpacked


def test_a_large_photograph_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png(12000, 1, bytes(36001)))
    assert read(tmp_path / "a.png").shape == (1, 12000, 3)


def test_files_that_are_not_regular_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "."):
        with pytest.raises(ArtifactError, match="it is not a regular file"):
            read(tmp_path / name)
    with pytest.raises(VqdeployError, match=r"none\.png does not exist") as caught:
        read(tmp_path / "none.png")
    assert caught.value.exit_code == 2


def test_endings_are_those_of_formats_that_can_be_read():
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".tga"} <= suffixes()
    assert not suffixes() & {".pdf", ".eps", ".ps", ".h5", ".hdf", ".grib", ".wmf", ".mpg", ".npy", ""}


@pytest.mark.parametrize("side", [300, 60000])
def test_the_limit_of_the_caller_is_the_one_that_is_named(side):
    with pytest.raises(ArtifactError, match="more than 5,000"):
        read_bytes(png(side, side), "an image", most=5000)
