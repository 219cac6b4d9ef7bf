"""The `step` graph of VAR with as many scales as the published ones, against the loop of the public code."""

from dataclasses import replace

import pytest
import torch
from support.systems import CONV, SMALL_VAR, lively

from vqdeploy.export.var import Step
from vqdeploy.models.var_tokenizer import SIDES, MultiScaleConfig
from vqdeploy.reference.next_scale import generate
from vqdeploy.systems import NextScaleSampling

SCALE = 4.0


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_ten_scales(shared):
    """Codes drawn with guidance, and the sum of their vectors."""
    tokenizer = MultiScaleConfig(replace(CONV, resolution=64), SIDES, codebook_size=64)
    prior = replace(SMALL_VAR.prior, sides=SIDES, shared_modulation=shared)
    system = lively(replace(SMALL_VAR, tokenizer=tokenizer, prior=prior))
    labels, last = torch.tensor([0, 2]), len(SIDES) - 1
    ones, generator = torch.ones(2, len(SIDES)), torch.Generator().manual_seed(0)
    noise = [-torch.empty(2, side**2, 64).exponential_(generator=generator).log() for side in SIDES]
    options = [ones, ones.long() * 64, ones]
    sampling = NextScaleSampling(guidance_scale=SCALE)
    expected, total = generate(system.prior, sampling, labels, lambda scale, shape: noise[scale], options)
    step, both = Step(system.prior), torch.stack([labels, torch.full_like(labels, prior.classes)], 1)
    drawn, grown = [], torch.zeros(2, SIDES[-1] ** 2, prior.code_dim)
    past = [torch.zeros(2, 2, 0, prior.width)] * 2 * prior.layers
    for scale, side in enumerate(SIDES):
        share = (SCALE - 1) * scale / last
        guidance = torch.tensor([[1 + share, -share]] * 2)
        own = (option[:, scale] for option in options)
        caches = past[: prior.layers], past[prior.layers :]
        codes, _, grown, *past = step(torch.full((2, side**2), 64), both, guidance, noise[scale], *own, grown, *caches)
        drawn.append(codes)
    assert expected.unique().numel() > 50
    torch.testing.assert_close(torch.cat(drawn, 1), expected)
    torch.testing.assert_close(grown, total.flatten(1, 2), rtol=1e-5, atol=1e-5)
