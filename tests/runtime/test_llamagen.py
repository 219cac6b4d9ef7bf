"""Sampling from LlamaGen's prior: an interval of guidance, and texts as features."""

import numpy as np
import pytest
import torch

from vqdeploy.cli.tasks import Job, run
from vqdeploy.errors import VqdeployError
from vqdeploy.models.llamagen import given
from vqdeploy.runtime.forcing import forced_logits
from vqdeploy.runtime.noise import gumbel
from vqdeploy.runtime.sampler import Item, Sampler

LENGTH, WIDTH = 7, 12
WHOLE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance_scale": 1.0}
TEXTS = np.random.default_rng(5).standard_normal((3, LENGTH, WIDTH)).astype(np.float32)
TEXTS[0, :4] = TEXTS[1, :1] = 0


def in_pytorch(system, conditions, scale, interval=-1, seed=0):
    size, shape = system.config.prior.codebook_size, (len(conditions), 1)

    def noise(position):
        out = np.empty((*shape, size), np.float32)
        gumbel([(seed, image, position) for image in range(len(conditions))], out)
        return torch.from_numpy(out)

    options = torch.ones(shape), torch.full(shape, size), torch.ones(shape)
    return system.prior.generate(torch.as_tensor(conditions), noise, *options, scale, interval).numpy()


@pytest.mark.parametrize("interval", [-1, 0, 5, 14, 99])
def test_codes_after_the_interval_are_drawn_without_guidance(llamagen_pipeline, llamagen_system, interval):
    labels = [0, 2, 1]
    expected = in_pytorch(llamagen_system, labels, 3.0, interval, seed=4)
    options = WHOLE | {"guidance_scale": 3.0, "guidance_interval": interval}
    np.testing.assert_array_equal(llamagen_pipeline.generate(labels, seed=4, **options).codes, expected)


def test_rows_without_a_label_leave_after_the_interval(llamagen_pipeline, monkeypatch):
    rows = []
    options = llamagen_pipeline.options(**WHOLE | {"guidance_scale": 3.0, "guidance_interval": 2})
    known = np.full((2, *llamagen_pipeline.grid), -1)

    def watched(sampler, stage, binding, run=Sampler._run):
        rows.append((len(binding.inputs["codes"]), len(binding.inputs["noise"])))
        run(sampler, stage, binding)

    monkeypatch.setattr(Sampler, "_run", watched)
    llamagen_pipeline.sample(known, [0, 1], chosen=options)
    assert rows == [(4, 2)] * 4 + [(2, 2)] * 12


@pytest.fixture(scope="module")
def forced(features_system):
    """Codes, and the logits of PyTorch for them."""
    config = features_system.prior.config
    codes = torch.randint(config.codebook_size, (3, *config.grid), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = features_system.prior.logits(codes, torch.from_numpy(TEXTS))
    return codes.numpy(), logits.flatten(1, 2).numpy()


@pytest.mark.parametrize("known", [0, 1, 6])
def test_logits_of_texts(features_pipeline, forced, known):
    codes, expected = forced
    places = np.where(np.arange(16)[:, None] < known, codes.reshape(3, 16, 1), -1).reshape(codes.shape)
    found = forced_logits(features_pipeline, codes.reshape(3, 16, 1), places, TEXTS)
    np.testing.assert_allclose(found, expected[:, known:], atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("scale", "interval"), [(1.0, -1), (3.0, -1), (3.0, 4)])
def test_codes_of_texts(features_pipeline, features_system, scale, interval):
    expected = in_pytorch(features_system, TEXTS, scale, interval, seed=3)
    options = WHOLE | {"guidance_scale": scale, "guidance_interval": interval}
    np.testing.assert_array_equal(features_pipeline.generate(TEXTS, seed=3, **options).codes, expected)


def test_no_text_is_the_longest_null_text(features_pipeline, features_system):
    known = np.full((1, *features_pipeline.grid), -1)
    none = features_system.prior.cls_embedding.uncond_embedding[None]
    assert given(none).all()
    expected = in_pytorch(features_system, none, 1.0, seed=2)
    np.testing.assert_array_equal(features_pipeline.complete(known, None, seed=2, **WHOLE).codes, expected)


def test_zeros_on_either_side_of_a_text_are_padding(features_pipeline):
    expected = features_pipeline.generate(TEXTS[:1], seed=1).codes
    short = TEXTS[:1, 4:]
    right = np.concatenate([short, np.zeros((1, 2, WIDTH))], 1)
    for texts in (short, right, short.astype(np.float64), TEXTS[:1].tolist()):
        np.testing.assert_array_equal(features_pipeline.generate(texts, seed=1).codes, expected)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, r"this prior needs texts; expected features \[B, up to 7, 12\], found none"),
        ([3], r"conditioned on texts; expected features \[B, up to 7, 12\], found \[1\]"),
        (TEXTS[0], r"found \[7, 12\]"),
        (TEXTS[:, :, :5], r"found \[3, 7, 5\]"),
        (np.zeros((1, 8, WIDTH)), r"found \[1, 8, 12\]"),
        (TEXTS.astype(int), "malformed; expected floats, found int64"),
        (TEXTS + np.inf, "malformed; expected finite numbers in fp32"),
        (TEXTS.astype(float) * 1e300, "malformed; expected finite numbers in fp32"),
        (TEXTS.astype(float) * 1e-300, "a text has no tokens"),
        (TEXTS * 0, "a text has no tokens"),
    ],
)
def test_malformed_texts_are_refused(features_pipeline, texts, message):
    with pytest.raises(VqdeployError, match=message):
        features_pipeline.generate(texts)


def test_a_text_is_prefilled_once_for_images_in_a_row(features_pipeline, monkeypatch):
    """And what stands for none once for texts of one length."""
    lengths, run = [], Sampler._run

    def watched(sampler, stage, binding):
        lengths.append(binding.inputs["codes"].shape[1])
        run(sampler, stage, binding)

    monkeypatch.setattr(Sampler, "_run", watched)
    other = -TEXTS[1:2]
    texts = np.concatenate([TEXTS[1:2]] * 3 + [other] * 2)
    options = WHOLE | {"guidance_scale": 2.0}
    with features_pipeline.sampler(5, guided=True) as sampler:
        for slot, text in enumerate(texts):
            sampler.admit(slot, Item(np.full(features_pipeline.grid, -1), text, 3, slot, options))
        assert lengths == [5, 5, 5]
        while not sampler.step():
            pass
        codes = np.stack([sampler.codes(slot) for slot in range(5)])
    np.testing.assert_array_equal(codes, features_pipeline.generate(texts, seed=3, **options).codes)
    for slot in (2, 4):
        alone = features_pipeline.generate(texts[slot : slot + 1], seed=3, first_image=slot, **options).codes
        np.testing.assert_array_equal(alone[0], codes[slot])


@pytest.fixture
def job(features_plan, tmp_path):
    """Runs `vqdeploy run` with a file of texts."""
    np.save(tmp_path / "a.npy", TEXTS)
    np.savez(tmp_path / "a.npz", text_features=TEXTS)
    np.savez(tmp_path / "ids.npz", text_ids=TEXTS)

    def start(name, plan=features_plan, **options):
        texts = name and tmp_path / name
        return run(Job(plan, output=tmp_path / "a.png", text_features=texts, options={"seed": 0}, **options))

    return start


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_run_generates_a_row_for_each_text(job, name):
    result = job(name, num_images=2)
    assert result["images"] == 6
    assert result["options"]["texts"] is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (None, {}, "this prior needs texts; expected --text-features FILE, found none"),
        (None, {"labels": ["1"]}, "--label does not fit this prior; expected --text-features, found --label"),
        ("ids.npz", {}, "an NPZ with text_features"),
    ],
)
def test_files_that_are_no_texts(job, name, options, message):
    with pytest.raises(VqdeployError, match=message):
        job(name, **options)


def test_known_codes_are_kept_and_the_rest_goes_on(features_pipeline):
    whole = features_pipeline.generate(TEXTS, seed=2, guidance_scale=2.0).codes
    known = whole.copy()
    known[:, 2:] = -1
    found = features_pipeline.complete(known, TEXTS, seed=2, guidance_scale=2.0).codes
    np.testing.assert_array_equal(found, whole)
