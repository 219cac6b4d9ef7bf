"""The layers that are exported compute what the trained ones do."""

import pytest
import torch

from vqdeploy.export.layers import ImageInput, ImageOutput, InferenceBlock, SplitUpsample
from vqdeploy.models.conv import Upsample
from vqdeploy.models.transformer import Block


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 5, 4, 7), (1, 8, 9, 2)])
@torch.no_grad()
def test_split_upsampling_is_the_same_sum(shape):
    upsample = Upsample(shape[1]).double()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(SplitUpsample(upsample)(x), upsample(x), rtol=0, atol=1e-13)


@pytest.fixture
def block():
    return Block(width=32, heads=4, dropout=0.0).eval()


@torch.no_grad()
def test_a_cached_block_is_the_block_entry_by_entry(block):
    x = torch.randn(2, 6, 32)
    key, value = torch.randn(2, 2, 4, 6, 8)  # whatever an earlier request left behind
    decode, outputs = InferenceBlock(block), []
    for first, last in ((0, 3), (3, 4), (4, 6)):
        position = torch.full((2,), first)
        output, key, value = decode.cached(x[:, first:last], key, value, position)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), block(x))


@torch.no_grad()
def test_an_appended_block_is_the_block_entry_by_entry(block):
    x = torch.randn(2, 4, 32)
    decode, keys, values = InferenceBlock(block), [], []
    outputs = [decode.append(x[:, i : i + 1], keys, values) for i in range(4)]
    torch.testing.assert_close(torch.cat(outputs, 1), block(x))


@pytest.mark.parametrize("pixel_range", [(-1.0, 1.0), (0.0, 1.0)])
def test_every_grey_level_survives_the_pixel_range(pixel_range):
    image = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    inside = ImageInput(pixel_range)(image)
    assert inside.min() == pixel_range[0]
    assert inside.max() == pytest.approx(pixel_range[1])
    assert torch.equal(ImageOutput(pixel_range)(inside), image)


def test_values_outside_the_pixel_range_are_clamped():
    x = torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2)
    assert ImageOutput((-1.0, 1.0))(x)[0, 0, :, 0].tolist() == [0, 255]
