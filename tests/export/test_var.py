"""The module of the `step` graph of VAR: with ten scales, as published, and the shipped weights in int8."""

from dataclasses import replace

import pytest
import torch
from support.systems import CONV, SMALL_VAR, lively

from vqdeploy.checkpoint import SHIPPED, load
from vqdeploy.export.package import stages_of
from vqdeploy.export.precision import QuantizedProduct
from vqdeploy.export.var import Step
from vqdeploy.models.var_tokenizer import SIDES, MultiScaleConfig
from vqdeploy.precision import PRECISIONS
from vqdeploy.reference.next_scale import generate
from vqdeploy.systems import NextScaleSampling

SCALE = 4.0
IMAGES = 64


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
    shares = [(SCALE - 1) * scale / last for scale in range(len(SIDES))]
    codes, _, grown = run(
        Step(system.prior),
        prior,
        [torch.full((2, side**2), 64) for side in SIDES],
        torch.stack([labels, torch.full_like(labels, prior.classes)], 1),
        [torch.tensor([[1 + share, -share]] * 2) for share in shares],
        noise,
        options,
    )
    assert expected.unique().numel() > 50
    torch.testing.assert_close(codes, expected)
    torch.testing.assert_close(grown, total.flatten(1, 2), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_shipped_weights_in_int8():
    """The divergence stays below the limit of `verify`, which sees fewer images."""
    system = load(SHIPPED / "var" / "tiny")
    prior, config, labels = system.prior, system.config.prior, torch.arange(IMAGES) % 10
    generator, codes = (
        torch.Generator().manual_seed(0),
        torch.zeros(IMAGES, *system.config.prior.grid, dtype=torch.int64),
    )
    for scale in range(len(config.sides)):
        own = prior.scales == scale
        chances = prior.logits(codes, labels)[:, own].softmax(-1)
        codes[:, own] = torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view(IMAGES, -1)
    expected = prior.logits(codes, labels).log_softmax(-1)
    (step,) = (stage.module for stage in stages_of(system, "int8") if stage.name == "step")
    assert isinstance(step.blocks[0].fc1.product, QuantizedProduct)
    ones = torch.ones(IMAGES, len(config.sides))
    known = codes.split([side**2 for side in config.sides], 1)
    noise = [torch.zeros(*each.shape, config.codebook_size) for each in known]
    found = run(step, config, known, labels[:, None], [ones[:, :1]] * len(known), noise, [ones, ones.long(), ones])[1]
    divergence = (expected.exp() * (expected - found.log_softmax(-1))).sum(-1).mean()
    assert 1e-5 < divergence < PRECISIONS["int8"].limits.divergence


def run(step, config, given, labels, guidance, noise, options):
    """All scales of images: codes, logits and the sum of the vectors."""
    images, layers = len(labels), config.layers
    codes, logits, grown = [], [], torch.zeros(images, config.sides[-1] ** 2, config.code_dim)
    past = [torch.zeros(images, labels.shape[1], 0, config.width)] * 2 * layers
    for scale, (known, scales, drawn) in enumerate(zip(given, guidance, noise, strict=True)):
        own = (option[:, scale] for option in options)
        found, scored, grown, *past = step(known, labels, scales, drawn, *own, grown, past[:layers], past[layers:])
        codes.append(found)
        logits.append(scored)
    return torch.cat(codes, 1), torch.cat(logits, 1), grown
