"""What a pixel of a file is in a model, by numbers written out here, and that exported graphs agree."""

import pytest
import torch

from vqdeploy.export.layers import ImageInput, ImageOutput
from vqdeploy.models.pixels import channels_first, channels_last, to_range, to_uint8

RANGES = [(-1.0, 1.0), (0.0, 1.0), (-0.5, 0.5)]


def test_a_pixel_keeps_its_row_its_column_and_its_colour():
    image = torch.zeros(1, 4, 5, 3, dtype=torch.uint8)
    image[0, 1, 3] = torch.tensor([255, 51, 0])  # row 1, column 3: red, a little green, no blue
    x = to_range(channels_first(image), (-1.0, 1.0))
    assert x.shape == (1, 3, 4, 5)
    assert x[0, :, 1, 3].tolist() == pytest.approx([1.0, -0.6, -1.0])
    assert x.sum() == pytest.approx(-60 + 2.4)
    assert torch.equal(channels_last(to_uint8(x, (-1.0, 1.0))), image)


@pytest.mark.parametrize("pixel_range", RANGES)
def test_uint8_survives_the_range_of_the_model(pixel_range):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = to_range(images, pixel_range)
    assert (x.min(), x.max()) == pytest.approx(pixel_range)
    assert torch.equal(to_uint8(x, pixel_range), images)


def test_what_lies_outside_the_range_is_cut_off():
    assert to_uint8(torch.tensor([-7.0, -1.001, 0.0, 1.001, 7.0]), (-1.0, 1.0)).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("pixel_range", RANGES)
def test_exported_graphs_read_and_write_the_same_pixels(pixel_range):
    image = torch.randint(0, 256, (2, 7, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ImageInput(pixel_range)(image), to_range(channels_first(image), pixel_range))
    x = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ImageOutput(pixel_range)(x), channels_last(to_uint8(x, pixel_range)))
