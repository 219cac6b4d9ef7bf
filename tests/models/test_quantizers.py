"""The quantizer of several channel groups."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vqdeploy.models.adaptive_maskgit import AdaptiveMaskGIT
from vqdeploy.models.maskgit import MaskGIT, MaskGITConfig
from vqdeploy.models.movq import MoVQ, MoVQConfig
from vqdeploy.models.quantizers import MultichannelQuantizer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_with_one_group_it_is_the_nearest_neighbour():
    quantizer = MultichannelQuantizer(20, 6, groups=1)
    z = torch.randn(2, 3, 4, 6)
    codes, vectors = quantizer.encode(z)
    nearest = torch.cdist(z.view(-1, 6), quantizer.codebook).argmin(1).view(2, 3, 4, 1)
    assert torch.equal(codes, nearest)
    torch.testing.assert_close(vectors, quantizer.codebook[nearest[..., 0]])


def test_each_group_of_channels_has_a_code_of_its_own():
    quantizer = MultichannelQuantizer(20, 12, groups=4)
    z = torch.randn(2, 3, 5, 12)
    codes, vectors = quantizer.encode(z)
    assert codes.shape == (2, 3, 5, 4)
    for group in range(4):
        channels = slice(3 * group, 3 * group + 3)
        nearest = torch.cdist(z[..., channels].reshape(-1, 3), quantizer.codebook).argmin(1)
        assert torch.equal(codes[..., group].flatten(), nearest)
        torch.testing.assert_close(vectors[..., channels].reshape(-1, 3), quantizer.codebook[nearest])
    torch.testing.assert_close(quantizer.decode(codes), vectors)
    changed = z.clone()
    changed[..., :3] += 5
    assert torch.equal(quantizer.encode(changed)[0][..., 1:], codes[..., 1:])


def test_the_cosine_compares_directions_and_gives_unit_vectors():
    quantizer = MultichannelQuantizer(20, 12, groups=3, metric="cosine")
    quantizer.codebook.mul_(torch.rand(20, 1) * 9 + 0.1)
    z = torch.randn(2, 5, 12)
    codes, vectors = quantizer.encode(z)
    groups = vectors.view(2, 5, 3, 4)
    torch.testing.assert_close(groups.norm(dim=-1), torch.ones(2, 5, 3))
    angles = F.cosine_similarity(z.view(2, 5, 3, 1, 4), quantizer.codebook, dim=-1)
    assert torch.equal(codes, angles.argmax(-1))
    torch.testing.assert_close(groups, F.normalize(quantizer.codebook)[codes])
    assert torch.equal(quantizer.encode(7 * z)[0], codes)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_distances_are_least_at_the_codes(metric):
    quantizer = MultichannelQuantizer(20, 12, groups=4, metric=metric)
    z = torch.randn(3, 5, 12)
    codes, vectors = quantizer.encode(z)
    distances = quantizer.distances(z, codes)
    assert distances.shape == (3, 5, 4, 20)
    assert torch.equal(distances.argmin(-1), codes)
    groups = z.view(3, 5, 4, 3)
    groups = F.normalize(groups, dim=-1) if metric == "cosine" else groups
    expected = (groups - vectors.view(3, 5, 4, 3)).square().sum(-1)
    torch.testing.assert_close(distances.amin(-1), expected, rtol=1e-4, atol=1e-5)


def test_a_training_step_moves_the_codebook_by_all_groups():
    quantizer = MultichannelQuantizer(8, 12, groups=4, decay=0.9).train()
    z, before = torch.randn(40, 12), {name: b.clone() for name, b in quantizer.named_buffers()}
    quantized = quantizer(z)
    codes, vectors = quantized.codes.flatten(), z.view(-1, 3)
    counts = np.bincount(codes, minlength=8)
    assert counts.min() > 0  # none is restarted
    sums = torch.stack([vectors[codes == code].sum(0) for code in range(8)])
    cluster = 0.9 * before["cluster_size_ema"] + 0.1 * torch.from_numpy(counts)
    torch.testing.assert_close(quantizer.cluster_size_ema, cluster.float())
    torch.testing.assert_close(quantizer.embed_ema, 0.9 * before["embed_ema"] + 0.1 * sums)
    torch.testing.assert_close(
        quantizer.codebook, quantizer.embed_ema / quantizer.cluster_size_ema[:, None], rtol=1e-4, atol=1e-5
    )
    # quantized before the step
    torch.testing.assert_close(quantized.vectors, before["codebook"][quantized.codes].view(40, 12))


def test_outside_training_the_codebook_stands_still_and_gradients_pass_through():
    quantizer = MultichannelQuantizer(8, 12, groups=4).eval()
    before, z = quantizer.codebook.clone(), torch.randn(5, 12, requires_grad=True)
    quantized = quantizer(z)
    assert torch.equal(quantizer.codebook, before)
    weights = torch.randn(5, 12)
    (straight,) = torch.autograd.grad((quantized.vectors * weights).sum(), z, retain_graph=True)
    torch.testing.assert_close(straight, weights)
    (pull,) = torch.autograd.grad(quantized.commitment_loss, z)
    torch.testing.assert_close(pull, 2 * (z.detach() - quantized.vectors.detach()) / z.numel())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultichannelQuantizer(8, 10, groups=4), "10 channels cannot be split into 4 groups"),
        (lambda: MultichannelQuantizer(8, 8, groups=4, metric="l1"), "no metric 'l1'"),
        (lambda: MoVQ(MoVQConfig(code_dim=30, groups=4)), "30 channels"),
        (lambda: MaskGIT(MaskGITConfig(width=66, heads=6)), "66 cannot be split among 4 channels"),
        (lambda: MaskGIT(MaskGITConfig(width=64, heads=7)), "7 heads"),
        (lambda: AdaptiveMaskGIT(MaskGITConfig(grid=(4, 4, 4), network="adaptive")), "one code per position, not 4"),
        (lambda: AdaptiveMaskGIT(MaskGITConfig(grid=(4, 4, 1), width=64, heads=7, network="adaptive")), "7 heads"),
    ],
)
def test_configurations_that_cannot_be(make, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        make()


def test_by_cosine_directions_are_learned():
    """Long vectors count no more than short ones."""
    torch.manual_seed(0)
    quantizer = MultichannelQuantizer(4, 8, 1, metric="cosine").train()
    directions = torch.eye(8)[:4].repeat(64, 1)
    for _ in range(200):
        quantized = quantizer(directions * torch.rand(len(directions), 1).mul(9).add(1))
    assert quantized.codes.unique().numel() == 4
    torch.testing.assert_close(
        F.normalize(quantizer.codebook, dim=1).sort(0).values, torch.eye(8)[:4].sort(0).values, atol=1e-2, rtol=0
    )
    assert quantized.commitment_loss < 1e-3
