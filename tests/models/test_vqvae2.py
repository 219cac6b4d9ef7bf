"""The tokenizer of several levels."""

import pytest
import torch

from vqdeploy.models.vqvae2 import VQVAE2, VQVAE2Config, join_levels, split_levels

CONFIG = {"channels": 16, "res_blocks": 1, "res_channels": 8, "codebook_size": 32, "code_dim": 8}


def tokenizer(levels=2, resolution=32):
    """With weights as large as trained ones and codebooks that lie among the latents; and images."""
    torch.manual_seed(0)
    model, x = VQVAE2(VQVAE2Config(resolution, levels, **CONFIG)), torch.rand(2, 3, resolution, resolution) * 2 - 1
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 4:
                torch.nn.init.kaiming_normal_(weight)
        model.train()(x)
    return model.eval(), x


@pytest.mark.parametrize("levels", [1, 2, 3])
@torch.no_grad()
def test_shapes_of_codes_and_images(levels):
    model, x = tokenizer(levels)
    grids = ((2, 2), (4, 4), (8, 8))[-levels:]
    assert model.config.level_grids == grids
    assert model.config.grid == (sum(h * w for h, w in grids),)
    codes = model.encode(x)
    assert (codes.shape, codes.dtype) == ((2, *model.config.grid), torch.int64)
    assert model.decode(codes).shape == x.shape
    reconstruction, quantized = model(x)
    torch.testing.assert_close(reconstruction, model.decode(codes))
    assert torch.equal(quantized.codes, codes)
    assert quantized.vectors.shape == (*codes.shape, CONFIG["code_dim"])
    assert quantized.commitment_loss.shape == ()
    assert [part.shape for part in model.depths(codes)] == [(2, h * w) for h, w in grids]


def test_codes_lie_in_a_row_top_first():
    grids = ((1, 2), (2, 4))
    row = torch.arange(2 * 10).view(2, 10)
    top, bottom = split_levels(row, grids)
    assert top[0].tolist() == [[0, 1]]
    assert bottom[0].tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert torch.equal(join_levels([top, bottom]), row)
    assert [part.shape for part in split_levels(torch.zeros(3, 10, 5), grids)] == [(3, 1, 2, 5), (3, 2, 4, 5)]


@torch.no_grad()
def test_distances_are_those_behind_each_code_given_the_coarser_ones():
    model, x = tokenizer(levels=3)
    codes = model.encode(x)
    distances = model.distances(x, codes)
    assert distances.shape == (*codes.shape, CONFIG["codebook_size"])
    assert torch.equal(distances.argmin(-1), codes)
    changed = codes.clone()
    changed[:, 3] = (changed[:, 3] + 1) % CONFIG["codebook_size"]  # the last one at the top
    moved = (model.distances(x, changed) - distances).abs().amax((0, 2))
    top, middle, bottom = model.depths(moved[None])
    assert top.max() == 0
    assert middle.max() > 1e-4
    assert bottom.max() > 1e-4
    changed = codes.clone()
    changed[:, -1] = 0  # nothing hangs on a code of the finest level
    assert torch.equal(model.distances(x, changed), distances)


def test_every_level_learns():
    model, x = tokenizer(levels=3)
    before = [quantizer.codebook.clone() for quantizer in model.quantizers]
    model(x)
    assert all(torch.equal(q.codebook, old) for q, old in zip(model.quantizers, before, strict=True))
    reconstruction, quantized = model.train()(x)
    assert not any(torch.equal(q.codebook, old) for q, old in zip(model.quantizers, before, strict=True))
    ((reconstruction - x).square().mean() + 0.25 * quantized.commitment_loss).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_commitment_is_summed_over_the_levels():
    model, x = tokenizer()
    codes = model.encode(x)
    least = model.distances(x, codes).gather(-1, codes[..., None])[..., 0] / CONFIG["code_dim"]
    expected = sum(level.mean() for level in model.depths(least))
    torch.testing.assert_close(model(x)[1].commitment_loss, expected)


@pytest.mark.parametrize(("levels", "resolution"), [(0, 32), (2, 36), (4, 16)])
def test_levels_that_do_not_fit_are_refused(levels, resolution):
    with pytest.raises(ValueError, match="levels do not fit a resolution"):
        VQVAE2(VQVAE2Config(resolution, levels, **CONFIG))
