"""The layers that are exported compute what the trained ones do."""

import numpy as np
import onnx_ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqdeploy.export.layers import ImageInput, ImageOutput, InferenceBlock, Modulation, SplitUpsample
from vqdeploy.export.llamagen import normalized
from vqdeploy.export.stage import Stage
from vqdeploy.models.conv import SpatialNorm, Upsample
from vqdeploy.models.transformer import Block, bidirectional


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 5, 4, 7), (1, 8, 9, 2)])
@torch.no_grad()
def test_split_upsampling_is_the_same_sum(shape):
    upsample = Upsample(shape[1]).double()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(SplitUpsample(upsample)(x), upsample(x), rtol=0, atol=1e-13)


@pytest.fixture
def norm():
    """With weights of every kind that a trained one has."""
    torch.manual_seed(0)
    norm = SpatialNorm(4, 6, 8).double()
    for weight in norm.parameters():
        torch.nn.init.normal_(weight)
    return norm


@pytest.mark.parametrize("times", [1, 2, 4, 8])
@torch.no_grad()
def test_spatial_norm_is_that_of_the_paper(norm, times):
    """Which enlarges the code vectors first and convolves them then."""
    x = torch.randn(2, 8, 3 * times, 5 * times, dtype=torch.float64) * 3 + 1
    condition = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    large = F.interpolate(condition, size=x.shape[-2:], mode="nearest")
    normal = F.group_norm(x, 4, norm.norm_layer.weight, norm.norm_layer.bias, eps=1e-6)
    expected = normal * norm.conv_y(large) + norm.conv_b(large)
    torch.testing.assert_close(norm(x, condition), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(Modulation(norm)(x, condition), expected, rtol=0, atol=1e-12)


@pytest.fixture
def block():
    return Block(32, 4, dropout=0.0, token_shift=False, activation=nn.GELU(), mlp_width=128).eval()


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


@torch.no_grad()
def test_a_whole_block_is_the_block_that_sees_everything(block):
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(InferenceBlock(block).whole(x), block(x, bidirectional))


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


def test_a_row_has_the_norm_that_it_has_among_others():
    """ONNX Runtime adds up a single row in another order where the norm has no weight of its own."""

    class Norm(nn.Module):
        def forward(self, x):
            return normalized(x)

    x = torch.randn(300, 1, 128)
    model = Stage("norm", Norm(), {"x": x[:2]}, ["y"]).to_onnx()
    run = ort.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]).run
    (together,) = run(None, {"x": x.numpy()})
    for i, row in enumerate(x.numpy()):
        np.testing.assert_array_equal(run(None, {"x": row[None]})[0][0], together[i])
