"""Training end to end, resume, the terms of the loss, the codebook's rules, the shipped weights."""

import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.systems import SMALL, SMALL_MOVQ, SMALL_VIT, SMALL_VQVAE2
from torch import nn
from torch.utils.data import Subset

from vqdeploy.checkpoint import SHIPPED, load
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.models.pixels import to_range
from vqdeploy.models.quantizers import AveragedCodebook, ResidualQuantizer
from vqdeploy.runtime.images import read
from vqdeploy.systems import SYSTEMS, Recipe, create, preset
from vqdeploy.training import train
from vqdeploy.training.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from vqdeploy.training.classifier import ImageClassifier
from vqdeploy.training.data import Draws, Files, images_of, open_data
from vqdeploy.training.metrics import codebook_use, diversity, psnr, reconstruct
from vqdeploy.training.prior import PriorTraining
from vqdeploy.training.stage import _loader, schedule
from vqdeploy.training.tokenizer import TokenizerTraining, logit_laplace

pytestmark = pytest.mark.slow

SYSTEMS = list(SYSTEMS)
SHORT = {"steps": 3, "prior_steps": 2, "classifier_steps": 3, "batch_size": 8, "samples": 20}


@pytest.fixture
def small(monkeypatch):
    """Fewer images to measure on, so that the runs are short."""

    def small_data(*args):
        data = open_data(*args)
        return data._replace(held_out=Subset(data.held_out, range(20)))

    monkeypatch.setattr("vqdeploy.training.prior._SAMPLES", 1)
    monkeypatch.setattr("vqdeploy.training.run.open_data", small_data)
    return small_data


@pytest.fixture
def folder(tmp_path):
    """An image folder of two classes: dark images and bright ones."""
    generator = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 150)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = generator.integers(low, low + 100, (40, 56, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


# Runs from end to end


@pytest.mark.parametrize("place", ["", "dark"])
def test_an_output_within_the_data_is_refused(folder, place):
    """Its state would become a class of the images, and could not be resumed."""
    with pytest.raises(VqdeployError, match=r"out lies in .*images, which is an input. Fix: name another place"):
        train(data=str(folder), output=folder / place / "out", **SHORT)
    with pytest.raises(VqdeployError, match="out lies in"):
        train(data="digits", held_out=folder, output=folder / "out", **SHORT)
    assert sorted(path.name for path in folder.iterdir()) == ["dark", "light"]


def test_images_where_the_state_would_be_are_not_called_a_state(folder):
    own = folder.rename(folder.with_name("out.training"))
    with pytest.raises(VqdeployError, match=r"out.training cannot be replaced \(it holds the input"):
        train(data=str(own), output=own.with_name("out"), **SHORT)
    assert (own / "dark" / "0.png").exists()


def test_images_that_are_trained_on_are_not_held_out(folder):
    with pytest.raises(VqdeployError, match="the images to train on are those that are held out"):
        train(data=str(folder), held_out=folder, output=folder.with_name("out"), **SHORT)


@pytest.mark.parametrize("model", SYSTEMS)
def test_digits(tmp_path, small, model):
    report = train(model, data="digits", output=tmp_path / "out", **SHORT)
    system = load(tmp_path / "out")
    assert system.config == preset(model, "tiny")
    assert system.config.labels == tuple("0123456789")
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == report
    assert report["recipe"]["steps"] == 3
    codebooks = [module for module in system.tokenizer.modules() if isinstance(module, AveragedCodebook)]
    assert all(codebook.cluster_size_ema.max() > 1 for codebook in codebooks)  # they have learned
    images, _ = images_of(small("digits", 32).held_out)
    reconstructions, codes = reconstruct(system.tokenizer, images)
    assert report["metrics"]["reconstruction_psnr"] == pytest.approx(psnr(reconstructions, images), abs=1e-3)
    use = codebook_use(system.tokenizer.depths(codes), system.config.tokenizer.codebook_size)
    assert report["metrics"]["usage"] == use["usage"]
    assert Image.open(tmp_path / "out" / "samples.png").size == (2 * 34 - 2, 10 * 34 - 2)
    assert Image.open(tmp_path / "out" / "reconstructions.png").size == (10 * 34 - 2, 2 * 34 - 2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_photos(tmp_path, small):
    report = train(data="photos", output=tmp_path / "out", **SHORT)
    labels = ("astronaut", "chelsea", "coffee", "rocket", "china", "flower")
    config = load(tmp_path / "out").config
    assert (config.labels, config.prior.classes) == (labels, 6)
    assert 0 <= report["metrics"]["class_accuracy"] <= 1


def test_image_folder(tmp_path, folder):
    train(data=str(folder), output=tmp_path / "out", **SHORT)
    assert load(tmp_path / "out").config.labels == ("dark", "light")


def test_the_current_folder_is_an_output(tmp_path, folder, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train(data=str(folder), output=Path("."), **SHORT)
    assert load(tmp_path / "here").config.labels == ("dark", "light")


@pytest.mark.parametrize("output", ["in", "in/dark/..", "up"])
def test_a_folder_that_is_read_is_not_replaced(tmp_path, folder, output):
    folder.rename(tmp_path / "in")
    (tmp_path / "up").symlink_to("in")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(VqdeployError, match="holds the input"):
        train(data=str(tmp_path / "in"), output=tmp_path / output, **SHORT)
    assert sorted(tmp_path.rglob("*")) == before


def test_images_without_classes(tmp_path, folder):
    report = train(data=str(folder / "dark"), output=tmp_path / "out", **SHORT)
    config = load(tmp_path / "out").config
    assert (config.labels, config.prior.classes) == ((), 1)
    assert "class_accuracy" not in report["metrics"]


@pytest.mark.parametrize("model", SYSTEMS)
def test_adversarial_run(tmp_path, folder, monkeypatch, model):
    logits = []
    forward = PatchDiscriminator.forward
    monkeypatch.setattr(PatchDiscriminator, "forward", lambda d, x: logits.append(forward(d, x)) or logits[-1])
    train(model, data=str(folder / "dark"), output=tmp_path / "out", adversarial_weight=0.75, **SHORT)
    assert len(logits) == 3 * SHORT["steps"]
    assert all(torch.isfinite(weight).all() for weight in load(tmp_path / "out").state_dict().values())


# Resume


class _Cut:
    """Cuts a run in the middle of a training step of a class, by Ctrl-C or by an error, and counts its steps."""

    def __init__(self, monkeypatch, training, cut, how):
        self.count, step = 0, training.training_step

        def counted(module, batch, index):
            self.count += 1
            if self.count == cut + 1:
                if how == "interrupt":
                    signal.raise_signal(signal.SIGINT)
                else:
                    raise MemoryError
            return step(module, batch, index)

        monkeypatch.setattr(training, "training_step", counted)


SMALL_ONES = {"rqvae": SMALL, "movq": SMALL_MOVQ, "vitvqgan": SMALL_VIT, "vqvae2": SMALL_VQVAE2}


def same_weights(first, second):
    first, second = load(first).state_dict(), load(second).state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("model", "stage", "cut", "how"),
    [
        ("rqvae", TokenizerTraining, 2, "interrupt"),  # the last step is done
        ("rqvae", PriorTraining, 1, "error"),  # the state is that of the step before
        ("movq", PriorTraining, 1, "interrupt"),
        ("vitvqgan", ImageClassifier, 1, "interrupt"),
        ("vqvae2", TokenizerTraining, 1, "error"),
    ],
)
def test_a_training_that_was_cut_ends_with_the_weights_of_one_that_was_not(
    tmp_path, folder, monkeypatch, model, stage, cut, how
):
    monkeypatch.setattr("vqdeploy.training.stage._FEWEST", 1)
    monkeypatch.setattr("vqdeploy.training.prior._SAMPLES", 1)
    monkeypatch.setattr("vqdeploy.training.run.find_preset", lambda model, preset: SMALL_ONES[model])
    options = {"model": model, "data": str(folder), "batch_size": 4, "samples": 4, "adversarial_weight": 0.5}
    options |= {"steps": 3, "prior_steps": 3, "classifier_steps": 3}
    train(**options, output=tmp_path / "whole")
    options["output"] = tmp_path / "cut"
    handler = signal.getsignal(signal.SIGINT)
    run = _Cut(monkeypatch, stage, cut, how)
    with pytest.raises(KeyboardInterrupt if how == "interrupt" else MemoryError):
        train(**options)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "cut").exists()
    with pytest.raises(VqdeployError, match=r"holds an interrupted training run.*--resume"):
        train(**options)
    with pytest.raises(VqdeployError, match="other options; expected seed 0, found seed 5"):
        train(**options, seed=5, resume=True)
    torch.rand(3)
    train(**options, resume=True)
    assert run.count == (3 if how == "interrupt" else 4)
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert not list(tmp_path.glob("*.training"))


def test_resume_is_refused_when_the_images_have_changed(tmp_path, folder, monkeypatch):
    options = {"data": str(folder), "output": tmp_path / "out"} | SHORT
    picture = folder / "dark" / "0.png"
    Image.new("RGB", (40, 56)).save(picture, "BMP")
    _Cut(monkeypatch, TokenizerTraining, 1, "interrupt")
    with pytest.raises(KeyboardInterrupt):
        train(**options)
    content = picture.read_bytes()
    for change in (
        picture.unlink,
        lambda: Image.new("RGB", (40, 56)).save(picture),
        lambda: picture.with_name("7.png").write_bytes(content),
        lambda: picture.write_bytes(content[:-1] + b"\x07"),  # one pixel
        lambda: picture.rename(folder / "light" / "9.png"),
    ):
        picture.with_name("7.png").unlink(missing_ok=True)
        picture.write_bytes(content)
        change()
        with pytest.raises(VqdeployError, match=r"images of .* have changed since .* interrupted.*out\.training"):
            train(**options, resume=True)
    (folder / "light" / "9.png").rename(picture)
    train(**options, resume=True)


@pytest.mark.parametrize(("name", "content"), [("tokenizer.ckpt", b"PK"), ("asked.json", b"[]"), ("asked.json", b"{")])
def test_a_damaged_state_is_named(tmp_path, folder, monkeypatch, name, content):
    options = {"data": str(folder), "output": tmp_path / "out"} | SHORT
    _Cut(monkeypatch, TokenizerTraining, 1, "interrupt")
    with pytest.raises(KeyboardInterrupt):
        train(**options)
    (tmp_path / "out.training" / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        train(**options, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"batches": -5},
        {"batches": 10**12},
        {"state_dict": {}},
        {"loops": {}},
        {"optimizer_states": []},
    ],
)
def test_a_state_that_is_none_is_named(tmp_path, folder, monkeypatch, change):
    options = {"data": str(folder), "output": tmp_path / "out"} | SHORT
    _Cut(monkeypatch, TokenizerTraining, 1, "interrupt")
    with pytest.raises(KeyboardInterrupt):
        train(**options)
    state = tmp_path / "out.training" / "tokenizer.ckpt"
    torch.save(torch.load(state, weights_only=True) | change, state)
    with pytest.raises(ArtifactError, match=r"tokenizer\.ckpt is damaged\. Fix: remove it"):
        train(**options, resume=True)


def test_the_learning_rate_climbs_and_falls_to_zero():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    schedule_, rates = schedule(optimizer, 100, warm_up=0.1), []
    for _ in range(100):
        rates.append(schedule_.get_last_lr()[0])
        optimizer.step()
        schedule_.step()
    assert rates[0] == pytest.approx(0.1)
    assert np.all(np.diff(rates[:9]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)
    assert rates[-1] < 1e-3
    assert rates[50] == pytest.approx(0.5)


# The codebook, by the published rules (facts/models.md 1a)


def _numpy_update(state, vectors, codes, decay):
    """One step of the moving averages, except for the drawn vectors: codebook, counts, sums and the restarted rows."""
    size, counts = len(state["codebook"]), np.zeros(len(state["codebook"]))
    sums = np.zeros_like(state["codebook"])
    for vector, code in zip(vectors, codes, strict=True):
        counts[code] += 1
        sums[code] += vector
    cluster_size = decay * state["cluster_size_ema"] + (1 - decay) * counts
    embed = decay * state["embed_ema"] + (1 - decay) * sums
    unused = cluster_size < 1
    cluster_size[unused] = 1
    total = cluster_size.sum()
    smoothed = (total * (cluster_size + 1e-5) / (total + size * 1e-5))[:, None]
    return {"cluster_size_ema": cluster_size, "embed_ema": embed, "smoothed": smoothed, "unused": unused}


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16), size=st.integers(2, 12), dim=st.integers(1, 5), count=st.integers(1, 30),
    decay=st.sampled_from([0.5, 0.9, 0.99]),
)  # fmt: skip
def test_codebook_update_matches_a_transcription(seed, size, dim, count, decay):
    torch.manual_seed(seed)
    quantizer = ResidualQuantizer(size, dim, depth=1, decay=decay)
    quantizer.cluster_size_ema.uniform_(0, 4)
    vectors, codes = torch.randn(count, dim), torch.randint(0, size, (count,))
    before = {name: buffer.double().numpy().copy() for name, buffer in quantizer.named_buffers()}
    expected = _numpy_update(before, vectors.double().numpy(), codes.numpy(), decay)
    quantizer._update(vectors, codes)

    used, unused = ~expected["unused"], expected["unused"]
    np.testing.assert_allclose(quantizer.cluster_size_ema, expected["cluster_size_ema"], rtol=1e-5)
    np.testing.assert_allclose(quantizer.embed_ema[used], expected["embed_ema"][used], rtol=1e-4, atol=1e-5)
    # Restarted rows are vectors of the batch, up to the jitter of copies where the batch is small.
    jitter = 0.01 / dim**0.5 if count < size else 0
    distances = (quantizer.embed_ema[unused][:, None] - vectors[None]).abs().amax(-1)
    assert torch.all(distances.amin(1) <= jitter + 1e-6) if unused.any() else used.all()
    np.testing.assert_allclose(quantizer.codebook, quantizer.embed_ema.numpy() / expected["smoothed"], rtol=1e-4)


def test_a_step_quantizes_with_the_codebook_before_its_update_and_updates_once_per_depth():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(8, 4, depth=3).train()
    z, codebook, calls = torch.randn(50, 4), quantizer.codebook.clone(), []
    update = quantizer._update
    quantizer._update = lambda vectors, codes: (calls.append((vectors, codes)), update(vectors, codes))
    quantized = quantizer(z)
    assert len(calls) == 3
    residual = z
    for depth, (vectors, codes) in enumerate(calls):
        torch.testing.assert_close(vectors, residual)
        assert torch.equal(codes, quantized.codes[:, depth])
        assert torch.equal(codes, torch.cdist(residual, codebook).argmin(1))
        residual = residual - codebook[codes]
    torch.testing.assert_close(quantized.vectors, z - residual)
    assert not torch.equal(quantizer.codebook, codebook)


def test_commitment_is_the_mean_over_partial_sums_and_moves_the_encoder_alone():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(16, 4, depth=4).eval()
    z = torch.randn(2, 3, 4, requires_grad=True)
    quantized = quantizer(z)
    expected, total, gradient = 0.0, torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    for depth in range(4):
        total = total + quantizer.codebook[quantized.codes[..., depth]]
        expected += float(((z.detach() - total) ** 2).mean()) / 4
        gradient += 2 * (z.detach() - total) / z.numel() / 4
    assert quantized.commitment_loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(quantized.commitment_loss, z)[0], gradient)


# The adversarial term


def test_the_discriminator_has_the_published_size():
    network = PatchDiscriminator()
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(0.663, abs=5e-4)  # facts/models.md 1a
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 6, 6)


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5])
    assert float(discriminator_loss(real, fake)) == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1.5) / 2) / 2)
    assert float(generator_loss(fake)) == pytest.approx(0.75)


def test_adaptive_weight_is_the_ratio_of_gradients_and_bounded():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction, generator = 3 * weight[0] + 4 * weight[1], weight[1] * 2
    assert float(adaptive_weight(reconstruction, generator, weight)) == pytest.approx(5 / 2.0001)
    assert float(adaptive_weight(2e4 * reconstruction, generator * 1e-6, weight)) == 1e4
    assert float(adaptive_weight(reconstruction * 0, generator, weight)) == 0


# Measurements


def test_codebook_use_of_known_codes():
    codes = torch.tensor([[0, 1], [0, 2], [1, 3], [1, 0]])
    use = codebook_use(codes.unbind(-1), 8)
    assert use["usage"] == [0.25, 0.5]
    assert use["perplexity"] == pytest.approx([2, 4])


def test_psnr_is_the_mean_over_images():
    originals = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images = originals.clone()
    images[0] += 1
    images[1] += 10
    expected = 20 * np.log10(255) - 10
    assert psnr(images, originals) == pytest.approx(expected, abs=1e-3)


def test_the_psnr_of_equal_images_is_a_number():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert psnr(images, images) == pytest.approx(98.13, abs=0.01)


def test_diversity_counts_classes_that_can_be_compared():
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    ones = torch.tensor([0, 0, 0, 0, 0, 1])  # one original of class 1
    assert diversity(images, labels, images, ones) == pytest.approx(diversity(images[:4], labels[:4], images, ones))
    assert diversity(images, labels, images[:2], torch.tensor([0, 1])) is None
    assert diversity(images, labels, images[:1].repeat(6, 1, 1, 1), labels) is None


def test_diversity_sees_one_picture_for_a_class():
    torch.manual_seed(0)
    originals, labels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8), torch.arange(40) % 2
    one_picture = originals[:2].repeat(20, 1, 1, 1)
    assert diversity(originals, labels, originals, labels) == pytest.approx(1)
    assert diversity(one_picture, labels, originals, labels) == 0


# Data


def test_held_out_digits_are_fixed_balanced_and_apart():
    data = open_data("digits", 32)
    images, labels = images_of(data.held_out)
    assert torch.equal(images, images_of(open_data("digits", 32).held_out)[0])
    assert (len(data.train), len(images)) == (1437, 360)
    assert labels.bincount().min() >= 34
    training = {np.asarray(digit).tobytes() for digit in data.train.digits}
    assert not training & {np.asarray(digit).tobytes() for digit in data.held_out.digits}
    draws, again, other = (Draws(data.train, seed, 8) for seed in (0, 0, 1))
    for i in range(8):
        assert torch.equal(draws[i][0], again[i][0])
        assert not torch.equal(draws[i][0], other[i][0])


def test_image_folder_split(folder):
    data = open_data(str(folder), 32)
    assert (len(data.train), len(data.held_out)) == (10, 2)
    assert not set(data.train.files) & set(data.held_out.files)
    assert [label for _, label in data.held_out.files] == [0, 1]
    for image, label in (data.train[i] for i in range(10)):
        assert image.shape == (3, 32, 32)
        assert (image.float().mean() > 128) == label


def test_a_folder_of_held_out_images(folder, tmp_path):
    held_out = tmp_path / "held-out"
    for label, level in (("dark", 20), ("light", 230)):
        (held_out / label).mkdir(parents=True)
        Image.new("RGB", (40, 40), (level,) * 3).save(held_out / label / "image.png")
    alone, data = open_data(str(folder), 32), open_data(str(folder), 32, held_out)
    assert data.labels == alone.labels == ("dark", "light")
    assert (len(data.train), len(data.held_out)) == (12, 2)
    assert {path.parents[1] for path, _ in data.held_out.files} == {held_out}
    Image.new("RGB", (40, 40), (21,) * 3).save(held_out / "dark" / "image.png")
    changed = open_data(str(folder), 32, held_out)
    assert len({data.fingerprint, alone.fingerprint, changed.fingerprint}) == 3
    (held_out / "dark").rename(held_out / "black")
    with pytest.raises(VqdeployError, match=r"other classes than .*; expected dark, light, found black, light"):
        open_data(str(folder), 32, held_out)
    for data_without in ("digits", "photos"):
        with pytest.raises(VqdeployError, match="only an image folder can have other held-out images"):
            open_data(data_without, 32, held_out)


def test_crops_and_mirrors_are_those_of_the_recipe(tmp_path):
    pixels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) // 64
    picture = np.stack([pixels * 4, pixels.T * 4, pixels * 0], 2).astype(np.uint8)
    for name in "ab":
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    whole = open_data(str(tmp_path), 64, recipe=Recipe(smallest_crop=1, mirror=False)).train
    for seed in range(4):
        np.testing.assert_array_equal(whole.item(0, np.random.default_rng(seed))[0].permute(1, 2, 0), picture)
    mirrored = open_data(str(tmp_path), 64, recipe=Recipe(smallest_crop=1)).train
    found = [mirrored.item(0, np.random.default_rng(seed))[0].permute(1, 2, 0).numpy() for seed in range(20)]
    assert {np.array_equal(image, picture) for image in found} == {True, False}
    assert all(np.array_equal(image, picture) or np.array_equal(image[:, ::-1], picture) for image in found)
    with pytest.raises(VqdeployError, match="smallest_crop is out of range"):
        Recipe(smallest_crop=1.5)


@pytest.mark.parametrize(("balanced", "least", "most"), [(False, 10, 30), (True, 80, 120)])
def test_a_balanced_recipe_draws_as_often_of_a_small_class(tmp_path, balanced, least, most):
    for name, count in (("few", 2), ("many", 18)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (8, 8), (index,) * 3).save(tmp_path / name / f"{index}.png")
    train = open_data(str(tmp_path), 8, tmp_path, Recipe(balanced=balanced, smallest_crop=1)).train
    drawn = [train.draw(np.random.default_rng(seed)) for seed in range(200)]
    assert least <= sum(train.files[index][1] == 0 for index in drawn) <= most
    assert set(drawn) == set(range(20))


# Refusals


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"model": "gan"}, "there is no model 'gan'"),
        (None, {"preset": "huge"}, "no preset 'huge'"),
        (None, {"preset": "cc3m-650m"}, "conditioned on text"),
        (
            None,
            {"data": "nowhere"},
            "no such data; expected digits, photos, an image folder or codes, found nowhere",
        ),
        (None, {"resume": True}, "no interrupted training run"),
        (None, {"steps": 0}, "^steps is out of range"),
        (None, {"batch_size": 10**18}, "^batch_size is out of range"),
        (lambda path: path.mkdir(), {}, "holds no images"),
        (lambda path: (path / "a").mkdir(parents=True) or (path / "a/x.png").write_bytes(b"no"), {}, "too few"),
    ],
)
def test_refusals_are_one_sentence(tmp_path, change, options, message):
    if change:
        change(tmp_path / "images")
        options = {"data": str(tmp_path / "images")}
    with pytest.raises(VqdeployError, match=message) as caught:
        train(output=tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_damaged_images_are_found_before_training_counted_and_listed(folder, tmp_path, caplog):
    good = (folder / "dark" / "0.png").read_bytes()
    (folder / "dark" / "9.png").write_bytes(b"not an image")
    with pytest.raises(ArtifactError, match=r"9\.png is not an image that can be read \(.*\)\. Fix: remove it"):
        train(data=str(folder), output=tmp_path / "out")
    for i in range(4):
        (folder / "light" / f"cut-{i}.png").write_bytes(good[: len(good) // 2])
    with (
        caplog.at_level("INFO", "vqdeploy"),
        pytest.raises(ArtifactError, match=r"5 of 17 images in .* cannot be read: .*9\.png .*cut-1\.png.* and 2 more"),
    ):
        train(data=str(folder), output=tmp_path / "out")
    assert all(f"cut-{i}.png is not an image" in caplog.text for i in range(4))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", ["train", "held_out"])
def test_an_image_that_is_damaged_later_is_named_without_a_traceback(folder, tmp_path, monkeypatch, workers, part):
    def damaged(*args):
        data = open_data(*args)._replace(workers=workers)
        for path, _ in getattr(data, part).files:
            path.write_bytes(path.read_bytes()[:200])
        return data

    monkeypatch.setattr("vqdeploy.training.run.open_data", damaged)
    with pytest.raises(ArtifactError, match=r"\d\.png is not an image that can be read") as caught:
        train(data=str(folder), output=tmp_path / "out", **SHORT)
    assert "\n" not in str(caught.value)
    assert not str(caught.value).endswith("..")


def test_loader_processes_import_nothing_from_the_current_folder(folder, tmp_path, monkeypatch):
    """Where they are not forked."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setattr("vqdeploy.training.run.open_data", lambda *args: open_data(*args)._replace(workers=1))
    said = lambda told, index: f"safe path: {os.environ.get('PYTHONSAFEPATH')}"  # noqa: E731
    monkeypatch.setattr("vqdeploy.training.stage._Told.__getitem__", said)
    with pytest.raises(ArtifactError, match="safe path: 1"):
        train(data=str(folder), output=tmp_path / "out", **SHORT)
    assert "PYTHONSAFEPATH" not in os.environ


def test_the_number_of_loader_processes_does_not_matter(folder):
    draws = Draws(open_data(str(folder), 32).train, seed=3, count=12)
    one, several = (list(_loader(draws, 4, workers)) for workers in (0, 2))
    for (images, labels), (others, same) in zip(one, several, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, same)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/0.png", "a/1.png", "b/none.txt", "c/0.png"], "in holds folders without images: b. Fix: remove"),
        (["0.png", "1.png", "a/0.png"], "in holds images beside folders of images: 0.png, 1.png beside a"),
        (["a/0.png", "b/0.png"], "too few images; expected 2 or more in one of its classes, found 1"),
        (["0.png"], "too few images; expected 2 or more, found 1"),
        (["a.txt"], "holds no images"),
        (["a\x1b[31m/0.png", "b/0.png"], r"'a\\x1b\[31m' in .* is not a valid class name"),
    ],
)
def test_folders_that_are_refused(tmp_path, names, message):
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(path) if name.endswith("png") else path.write_text("x")
    with pytest.raises(VqdeployError, match=message):
        open_data(str(tmp_path / "in"), 32)


def test_training_and_run_see_the_same_pixels(tmp_path):
    """A turned photograph of odd size, 16-bit grey, and a drawing on nothing."""
    grey = np.add.outer(np.arange(63), 2 * np.arange(80)).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.dstack([grey, grey[::-1], 255 - grey])).save(tmp_path / "a.jpg", exif=turned)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "b.png")
    Image.fromarray(np.dstack([grey * 0] * 3 + [grey])).save(tmp_path / "c.png")
    files = Files([(path, 0) for path in sorted(tmp_path.iterdir())], 32, Recipe())
    for i, (path, _) in enumerate(files.files):
        np.testing.assert_array_equal(files[i][0].permute(1, 2, 0).numpy(), read(path, 32))


def test_what_cannot_be_measured_is_null_and_not_nan(tmp_path, folder):
    """Two held-out images: no class has two originals to compare."""
    report = train(data=str(folder), output=tmp_path / "out", **SHORT)
    assert report["metrics"]["sample_diversity"] is None
    text = (tmp_path / "out" / "training.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == report
    assert json.loads(Image.open(tmp_path / "out" / "samples.png").text["vqdeploy"], parse_constant=pytest.fail)


def test_a_training_that_diverges_is_named(tmp_path, folder):
    with pytest.raises(ArtifactError, match=r"in what the stage tokenizer has trained is not finite"):
        train(data=str(folder), output=tmp_path / "out", learning_rate=1e30, **SHORT)


@pytest.mark.parametrize("option", [{"learning_rate": float("nan")}, {"perceptual_weight": float("inf")}])
def test_recipes_are_finite(tmp_path, option):
    with pytest.raises(VqdeployError, match=f"{next(iter(option))} is out of range"):
        train(output=tmp_path / "out", **option)


def test_a_folder_with_something_else_is_refused_before_training(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(VqdeployError, match="holds something else"):
        train(output=tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_perceptual_weights_are_not_downloaded(tmp_path, monkeypatch):
    weights = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url="https://host/models/vgg16-1.pth"))
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", SimpleNamespace(VGG16_Weights=weights))
    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", pytest.fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(VqdeployError, match=r"weights in .*hub/checkpoints/vgg16-1\.pth"):
        train(output=tmp_path / "out", perceptual_weight=1.0)
    assert not (tmp_path / "out.training").exists()


def test_perceptual_term_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", False)
    with pytest.raises(VqdeployError, match="pip install torchvision"):
        train(output=tmp_path / "out", perceptual_weight=1.0)
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("model", SYSTEMS)
def test_perceptual_term_is_weighted_and_reaches_the_decoder(monkeypatch, model):
    seen = []

    class Distance(nn.Module):  # stands in for VGG, whose weights are a download
        def forward(self, first, second):
            seen.append(second)
            return (first - second).abs().flatten(1).mean(1)

    monkeypatch.setattr("vqdeploy.training.tokenizer.perceptual_network", Distance)
    tokenizer = create(preset(model, "tiny")).tokenizer
    training = TokenizerTraining(tokenizer, Recipe(perceptual_weight=2.0))
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    x = to_range(images, tokenizer.config.pixel_range)
    reconstruction = tokenizer(x)[0]
    term = training._perceptual(reconstruction, x)
    torch.testing.assert_close(seen[0], to_range(images, (-1.0, 1.0)))  # what LPIPS takes, whatever the model's range
    factor = 2 / (tokenizer.config.pixel_range[1] - tokenizer.config.pixel_range[0])
    torch.testing.assert_close(term, 2 * factor * (reconstruction - x).abs().mean())
    term.backward()
    assert tokenizer.last_weight.grad.abs().sum() > 0
    assert TokenizerTraining(tokenizer, Recipe())._perceptual(reconstruction.detach(), x) == 0


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(VqdeployError, match=r"needs the package sklearn.datasets.*vqdeploy\[train\]"):
        open_data("digits", 32)


# The shipped weights


@pytest.fixture(scope="module", params=sorted(path.name for path in SHIPPED.iterdir()))
def shipped(request):
    return SHIPPED / request.param / "tiny"


def test_shipped_weights_are_small_and_reach_the_limits(shipped):
    assert {path.name for path in shipped.iterdir()} == {"config.json", "model.safetensors", "training.json"}
    assert (shipped / "model.safetensors").stat().st_size <= 5_100_000
    training = json.loads((shipped / "training.json").read_text())
    metrics = training["metrics"]
    assert metrics["reconstruction_psnr"] >= 24
    assert metrics["classifier_accuracy"] >= 0.97
    assert metrics["samples"] == 1000
    assert metrics["class_accuracy"] >= 0.9
    assert metrics["sample_diversity"] >= 0.5
    assert {"seed", "data", "recipe", "versions"} <= set(training)


def test_shipped_weights_measured_again(shipped):
    system = load(shipped)
    assert system.config == preset(shipped.parent.name, "tiny")
    images, _ = images_of(open_data("digits", 32).held_out)
    reconstructions, _ = reconstruct(system.tokenizer, images)
    measured = psnr(reconstructions, images)
    assert measured >= 24
    training = json.loads((shipped / "training.json").read_text())
    assert measured == pytest.approx(training["metrics"]["reconstruction_psnr"], abs=0.2)
    assert all(torch.isfinite(weight).all() for weight in system.state_dict().values())


@pytest.mark.parametrize("model", ["movq", "rqvae", "var", "llamagen"])
def test_emoji_measured_again(model):
    """On ten of the images that the weights were not trained on."""
    folder = SHIPPED / model / "emoji"
    system, training = load(folder), json.loads((folder / "training.json").read_text())
    assert system.config == preset(model, "emoji")
    pictures = sorted((Path(__file__).parents[2] / "examples" / "emoji").glob("*.png"))
    assert tuple(picture.stem for picture in pictures) == system.config.labels
    images = torch.from_numpy(np.stack([read(picture, 64) for picture in pictures])).permute(0, 3, 1, 2)
    measured = psnr(reconstruct(system.tokenizer, images)[0], images)
    assert measured == pytest.approx(training["metrics"]["reconstruction_psnr"], abs=2)
    assert training["data"] == "emoji/train"
    assert training["metrics"]["samples"] == 1000


def test_shipped_emoji_are_small():
    sizes = {file.parts[-3]: file.stat().st_size for file in SHIPPED.glob("*/emoji/model.safetensors")}
    assert set(sizes) == {"movq", "rqvae", "var", "llamagen"}
    assert sizes["movq"] + sizes["rqvae"] <= 12_000_000
    assert max(sizes["var"], sizes["llamagen"]) <= 4_000_000


def test_logit_laplace_is_finite_everywhere_and_zero_for_equals():
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert logit_laplace(x, x) == 0
    made = torch.tensor([-5.0, 0.0, 0.5, 1.0, 5.0], requires_grad=True)
    losses = [logit_laplace(pixel, torch.tensor(0.5)) for pixel in made]
    assert torch.isfinite(torch.stack(losses)).all()
    assert losses[1] > losses[2] == 0 < losses[3]
    losses[3].backward()
    assert torch.isfinite(made.grad).all()


def test_logit_laplace_is_a_term_of_the_loss(tmp_path, folder):
    options = SHORT | {"data": str(folder / "dark"), "steps": 2}
    train("vitvqgan", output=tmp_path / "without", **options)
    train("vitvqgan", output=tmp_path / "with", logit_laplace_weight=0.5, **options)
    weights = [load(tmp_path / name).tokenizer.pre_quant.weight for name in ("without", "with")]
    assert not torch.equal(*weights)
    assert all(torch.isfinite(weight).all() for weight in weights)
