"""Next-scale sampling of plans: calls, records of the public code, painting, previews, and `more_smooth`."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.golden import assert_close, read_golden

from vqdeploy.convert import var as importer
from vqdeploy.convert.containers import Source
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime import interface, load
from vqdeploy.runtime.layout import Layout
from vqdeploy.runtime.manifest import Manifest
from vqdeploy.runtime.next_scale import NextScaleSampler
from vqdeploy.runtime.sampler import Item
from vqdeploy.systems import NextScaleSampling, SystemConfig, create

SIDES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def recorded(artifacts):
    """A plan of the recorded tokenizer and prior, and the records."""
    config, _, state = read_golden("var_vae")
    tokenizer = importer.tokenizer(Source("var_vae", state, "", config))
    _, tensors, state = read_golden("var")
    prior = importer.prior([Source("var", state, "", None)], tokenizer)
    config = SystemConfig("var", "golden", prior.tokenizer, prior.config, sampling=NextScaleSampling())
    system = create(config)
    system.tokenizer.load_state_dict(tokenizer.weights)
    system.prior.load_state_dict(prior.weights)
    return artifacts.pipeline(system), tensors


@pytest.mark.parametrize("guided", [False, True])
def test_a_plan_draws_the_recorded_greedy_codes(recorded, guided):
    pipeline, tensors = recorded
    scale = 1 + float(tensors["in/cfg"]) if guided else 1.0
    output = pipeline.generate(tensors["in/class"].numpy(), temperature=0, top_k=0, top_p=1.0, guidance_scale=scale)
    expected = tensors["out/greedy_codes_cfg" if guided else "out/greedy_codes"].numpy()
    np.testing.assert_array_equal(output.codes, expected)
    if guided:
        image = (tensors["out/greedy_image"][0] * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(output.images[0] - image).max() <= 1


def test_a_plan_blends_the_recorded_maps(recorded):
    pipeline, tensors = recorded
    options = {"top_k": int(tensors["in/smooth_top_k"]), "top_p": float(tensors["in/smooth_top_p"]), "more_smooth": 1}
    chosen = pipeline.options(**options, guidance_scale=1 + float(tensors["in/cfg"]))
    gumbel = tensors["in/smooth_gumbel"].split([side**2 for side in SIDES], 1)

    def draw(keys, rows):
        for (_, image, scale), row in zip(keys, rows, strict=True):
            row[...] = gumbel[scale][image].numpy()

    with pipeline.sampler(2, guided=True) as sampler:
        sampler.draw = draw
        for slot, label in enumerate(tensors["in/class"].tolist()):
            sampler.admit(slot, Item(np.full(30, -1), label, 0, slot, chosen))
        while sampler.left(0):
            sampler.step()
        maps = np.stack([sampler.drawn(slot).whole_map for slot in range(2)])
    assert_close(torch.from_numpy(maps).mT.unflatten(-1, (4, 4)), tensors["out/smooth_f_hat"])


def test_an_image_takes_one_call_a_scale(var_pipeline):
    steps = []
    output = var_pipeline.generate([0, 1], seed=1, callback=steps.append)
    assert [(step.step, step.steps) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for step, known in zip(steps, (1, 5, 14, 30), strict=True):
        np.testing.assert_array_equal(step.codes[:, :known], output.codes[:, :known])
        assert (step.codes[:, known:] == -1).all()


def test_calls_end_with_the_last_unknown_code(var_pipeline):
    known = np.arange(30)
    known[3] = -1
    with var_pipeline.sampler(1) as sampler:
        sampler.admit(0, Item(known, 0, 0, 0, var_pipeline.options(guidance_scale=1.0)))
        assert sampler.left(0) == 2
        sampler.step()
        assert sampler.step() == [0]
        codes = sampler.codes(0)
    np.testing.assert_array_equal(np.delete(codes, 3), np.delete(known, 3))
    assert codes[3] >= 0


def test_images_join_when_none_runs(var_pipeline):
    unknown, options = np.full(30, -1), var_pipeline.options(guidance_scale=1.0)
    with var_pipeline.sampler(2) as sampler:
        sampler.admit(0, Item(unknown, 0, 0, 0, options))
        sampler.step()
        with pytest.raises(VqdeployError, match="cannot join while others run"):
            sampler.admit(1, Item(unknown, 0, 0, 1, options))


def test_options_of_each_scale(var_pipeline):
    """Greedy at all scales but the first: what follows a first code is one image."""
    options = {"temperature": [5.0, 0, 0, 0], "top_k": 0, "guidance_scale": 1.0}
    codes = var_pipeline.generate([0] * 12, seed=2, **options).codes
    firsts = np.unique(codes[:, 0])
    assert len(firsts) > 3
    assert len(np.unique(codes, axis=0)) == len(firsts)
    with pytest.raises(VqdeployError, match="temperature has the wrong number of values"):
        var_pipeline.options(temperature=[1.0, 1.0])


def test_the_first_maps_are_decoded(var_pipeline, var_system):
    codes = var_pipeline.generate([0, 1], seed=3).codes
    cut = torch.from_numpy(np.where(np.arange(30) < 5, codes, -1))
    with torch.no_grad():
        pixels = var_system.tokenizer.decode(cut)
    expected = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    for images in (var_pipeline.decode(codes, depth=2), var_pipeline.preview(cut.numpy())):
        assert np.abs(images - expected).max() <= 1
    with pytest.raises(VqdeployError, match=r"no such depth; expected 1\.\.4"):
        var_pipeline.decode(codes, depth=5)


def test_more_smooth_is_another_image_and_draws_codes_beside(var_pipeline):
    plain, smooth = (var_pipeline.generate([0, 1], seed=3, more_smooth=value) for value in (0, 1))
    np.testing.assert_array_equal(plain.codes[:, 0], smooth.codes[:, 0])
    assert (plain.images != var_pipeline.decode(plain.codes)).sum() == 0
    assert (smooth.images != var_pipeline.decode(smooth.codes)).mean() > 0.1
    alone = var_pipeline.generate([1], seed=3, first_image=1, more_smooth=1)
    assert np.abs(alone.images[0].astype(int) - smooth.images[1]).max() <= 1


@pytest.mark.parametrize("size", [16, 64, 256])
def test_masks_are_scaled_as_pytorch_does(size):
    """The coarsest map is kept, others are cut at a half, whatever their side."""
    sides = (1, 2, 3, 5, 8, 13, 16) if size == 256 else SIDES
    mask = np.zeros((2, size, size), bool)
    mask[0, size // 5 : size // 2, size // 3 :] = True
    mask[1] = np.random.default_rng(0).random((size, size)) < 0.5
    unknown = Layout(tuple((side, side, 1) for side in sides)).masked(mask, raster=False)
    first = 0
    for side in sides:
        cells = F.interpolate(torch.from_numpy(mask)[:, None].double(), (side, side), mode="bilinear")[:, 0] >= 0.5
        expected = cells.flatten(1).numpy() if side > 1 else np.zeros((2, 1), bool)
        np.testing.assert_array_equal(unknown[:, first : first + side**2], expected)
        first += side**2
    everything = np.ones((1, size, size), bool)
    assert Layout(((1, 1, 1), (2, 2, 1))).masked(everything, raster=False).all()


def test_painting_keeps_what_is_not_masked(var_pipeline):
    images = var_pipeline.generate([0, 1], seed=5).images
    mask = np.zeros((16, 16), bool)
    mask[4:13, 3:12] = True
    known, unknown = var_pipeline.encode(images), var_pipeline.unknown(2, mask=mask)
    for labels in (None, [2, 2]):
        output = var_pipeline.inpaint(images, labels, mask=mask, seed=1)
        np.testing.assert_array_equal(output.codes[~unknown], known[~unknown])
        assert (output.codes != known)[unknown].any()
        np.testing.assert_array_equal(output.images[:, ~mask], images[:, ~mask])
    outside = var_pipeline.inpaint(images, mask=~mask, seed=1)
    np.testing.assert_array_equal(outside.images[:, mask], images[:, mask])


def test_a_mask_between_the_centres_of_codes_is_refused(var_pipeline):
    """Instead of the image that was given, decoded."""
    mask = np.zeros((16, 16), bool)
    mask[4, 5] = True
    for each in (mask, np.stack([mask, np.ones_like(mask)])):
        with pytest.raises(VqdeployError, match="the mask is too small; expected one that covers the centre of a code"):
            var_pipeline.unknown(2, mask=each)
    assert not var_pipeline.unknown(1, mask=np.zeros((16, 16), bool)).any()


def test_finer_maps_are_drawn_anew(var_pipeline):
    images = var_pipeline.generate([0], seed=5).images
    output = var_pipeline.resample(images, [0], keep=2, completions=3, seed=1)
    assert (output.codes[:, :5] == var_pipeline.encode(images)[:, :5]).all()
    assert len(np.unique(output.codes, axis=0)) == 3


def test_a_plan_whose_caches_do_not_grow_is_refused(var_plan, var_pipeline):
    data = var_pipeline.manifest.to_dict()
    (step,) = [stage for stage in data["stages"] if stage["name"] == "step"]
    (key,) = [info for info in step["outputs"] if info["name"] == "present_key.0"]
    key["shape"] = [size if size != "total" else "length" for size in key["shape"]]
    manifest = Manifest.from_dict(data)
    tokenizer, sampling = manifest.tokenizer, manifest.sampling
    inputs, outputs = (of(tokenizer, sampling) for of in (NextScaleSampler.inputs, NextScaleSampler.outputs))
    with pytest.raises(ArtifactError, match="stage step does not fit its sampler"):
        interface.check(manifest, inputs, outputs)


def test_a_sampler_in_use_blends_after_its_pipeline_is_closed(artifacts):
    plan = artifacts.plan("var")
    with load(plan, threads=1) as pipeline:
        wanted = pipeline.generate([1], seed=3, more_smooth=1).codes[0]
    pipeline = load(plan, threads=1)
    options = pipeline.options(more_smooth=1)
    with pipeline.sampler(1, guided=options["guidance_scale"] != 1) as sampler:
        sampler.admit(0, Item(np.full(pipeline.grid, -1), 1, 3, 0, options))
        pipeline.close()
        while not sampler.step():
            pass
        np.testing.assert_array_equal(sampler.codes(0), wanted)


@pytest.mark.parametrize("maps", [np.zeros((1, 16, 3), np.float32), np.zeros((1, 16, 16)), 1, np.zeros((0, 16, 16))])
def test_maps_that_cannot_be_decoded(artifacts, maps):
    with pytest.raises(VqdeployError):
        artifacts.pipeline("var").decode_maps(maps)
    with pytest.raises(ArtifactError, match="no stage 'reconstruct'"):
        artifacts.pipeline("rqvae").decode_maps(np.zeros((1, 16, 16), np.float32))
