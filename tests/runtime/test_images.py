"""Images read from files."""

import numpy as np
from PIL import Image

from vqdeploy.runtime.images import read


def test_sixteen_bit_grey_is_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 30000, np.uint16)).save(tmp_path / "grey.png")
    assert (read(tmp_path / "grey.png") == 117).all()


def test_a_turned_photograph_is_read_upright(tmp_path):
    image = Image.fromarray(np.zeros((2, 6, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turn by a quarter
    image.save(tmp_path / "photo.jpg", exif=turned)
    assert read(tmp_path / "photo.jpg").shape == (6, 2, 3)
