"""Temperature 0 and top-k 1 take the likeliest code, whatever the seed: where logits tie, noise must not choose."""

import numpy as np
import pytest

from vqdeploy.runtime import autoregressive, hierarchical, masked
from vqdeploy.runtime.request import still_where_greedy

LOOPS = {"pipeline": autoregressive, "movq_pipeline": masked, "vqgan_pipeline": autoregressive}
LOOPS |= {"vqvae2_pipeline": hierarchical}
OPTIONS = ({"temperature": 0}, {"top_k": 1})


@pytest.mark.parametrize("options", OPTIONS, ids=["temperature", "top-k"])
@pytest.mark.parametrize("name", LOOPS)
def test_the_likeliest_code_needs_no_noise(name, options, request, monkeypatch):
    pipeline, loop = request.getfixturevalue(name), LOOPS[name]
    extra = {"choice_temperature": 0} if loop is masked else {}
    expected = pipeline.generate([0, 1], seed=1, **options, **extra).codes
    draw = loop.gumbel

    def spoiled(seed, images, step, out):
        draw(seed, images, step, out)
        if out.shape[-1] == pipeline.codebook_size:
            out[:] = np.nan

    monkeypatch.setattr(loop, "gumbel", spoiled)
    np.testing.assert_array_equal(pipeline.generate([0, 1], seed=2, **options, **extra).codes, expected)


def test_depths_are_told_apart():
    inputs = {"top_k": np.array([[1, 5, 1]] * 2), "noise": np.ones((2, 4, 4, 3, 8), np.float32)}
    still_where_greedy(inputs)
    np.testing.assert_array_equal(inputs["noise"].any((0, 1, 2, 4)), [False, True, False])
    assert inputs["noise"][..., 1, :].all()


def test_nothing_is_greedy_by_default():
    inputs = {"top_k": np.full((2, 3), 8), "noise": np.ones((2, 3, 8), np.float32)}
    still_where_greedy(inputs)
    assert inputs["noise"].all()
