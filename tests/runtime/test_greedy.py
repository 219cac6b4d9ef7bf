"""Temperature 0 and top-k 1 take the likeliest code, whatever the seed: where logits tie, noise must not choose."""

import numpy as np
import pytest

from vqdeploy.runtime.noise import gumbel
from vqdeploy.runtime.sampler import Item

PIPELINES = ("pipeline", "movq_pipeline", "vqgan_pipeline", "vqvae2_pipeline")
OPTIONS = ({"temperature": 0}, {"top_k": 1})


def admitted(sampler, pipeline, seed, **options):
    """Puts an image of each of the first labels into the slots of a sampler."""
    chosen = pipeline.options(**options)
    for slot in range(sampler.slots):
        sampler.admit(slot, Item(np.full(pipeline.grid, -1), slot, seed, slot, chosen))


@pytest.mark.parametrize("options", OPTIONS, ids=["temperature", "top-k"])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_likeliest_code_needs_no_noise(name, options, request):
    pipeline = request.getfixturevalue(name)
    extra = {"choice_temperature": 0} if name == "movq_pipeline" else {}
    if pipeline.sampling.no_label is not None:
        extra["guidance_scale"] = 1
    expected = pipeline.generate([0, 1], seed=1, **options, **extra).codes

    def spoiled(keys, rows):
        gumbel(keys, rows)
        for row in rows:
            if row.shape[-1] == pipeline.codebook_size:
                row[:] = np.nan

    with pipeline.sampler(2) as sampler:
        sampler.draw = spoiled
        admitted(sampler, pipeline, 2, **options, **extra)
        while sampler.left(0):
            sampler.step()
        np.testing.assert_array_equal([sampler.codes(slot) for slot in range(2)], expected)


def noise_of_a_step(pipeline, **options):
    """The noise [2, Q, K] that goes into the first step, where each draw is 1."""

    def ones(keys, rows):
        for row in rows:
            row[:] = 1

    with pipeline.sampler(2) as sampler:
        sampler.draw = ones
        admitted(sampler, pipeline, 0, **options)
        sampler.step()
        return np.array(sampler.last.inputs["noise"])


def test_depths_are_told_apart(pipeline):
    noise = noise_of_a_step(pipeline, temperature=[0, 1, 1, 1], top_k=[5, 5, 1, 5])
    np.testing.assert_array_equal(noise.any((0, 2)), [False, True, False, True])
    assert noise[:, [1, 3]].all()


def test_images_are_told_apart(pipeline):
    with pipeline.sampler(2) as sampler:
        for slot, temperature in enumerate((0, 1)):
            options = pipeline.options(temperature=temperature)
            sampler.admit(slot, Item(np.full(pipeline.grid, -1), 0, 0, slot, options))
        sampler.step()
        noise = np.array(sampler.last.inputs["noise"])
    assert not noise[0].any()
    assert noise[1].all()


def test_nothing_is_greedy_by_default(pipeline):
    assert noise_of_a_step(pipeline).all()
