"""Training end to end, resume, the terms of the loss, the codebook's rules, the shipped weights."""

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import Subset

from vqdeploy.checkpoint import SHIPPED, load
from vqdeploy.errors import VqdeployError
from vqdeploy.models.quantizers import AveragedCodebook, ResidualQuantizer
from vqdeploy.systems import SYSTEMS, create, preset
from vqdeploy.training import Recipe, train
from vqdeploy.training.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from vqdeploy.training.data import images_of, open_data, to_range, to_uint8
from vqdeploy.training.metrics import codebook_use, diversity, psnr, reconstruct
from vqdeploy.training.prior import PriorTraining
from vqdeploy.training.stage import schedule
from vqdeploy.training.tokenizer import TokenizerTraining, logit_laplace

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


class _Counter:
    """Counts the training steps of a class, and cuts the one numbered `cut` as Ctrl-C does."""

    def __init__(self, monkeypatch, training, cut=None):
        self.count, self.cut, step = 0, cut, training.training_step

        def counted(module, batch, index):
            if self.count == self.cut:
                self.cut = None
                raise KeyboardInterrupt
            self.count += 1
            return step(module, batch, index)

        monkeypatch.setattr(training, "training_step", counted)


@pytest.mark.parametrize(("stage", "cut"), [("tokenizer", 2), ("prior", 0), ("prior", 3)])
def test_resume_continues_where_it_was_cut(tmp_path, folder, monkeypatch, stage, cut):
    options = {"data": str(folder / "dark"), "output": tmp_path / "out"} | SHORT | {"steps": 4, "prior_steps": 5}
    tokenizer = _Counter(monkeypatch, TokenizerTraining, cut if stage == "tokenizer" else None)
    prior = _Counter(monkeypatch, PriorTraining, cut if stage == "prior" else None)
    with pytest.raises(KeyboardInterrupt):
        train(**options)
    assert not (tmp_path / "out").exists()
    assert (tokenizer.count, prior.count) == ((2, 0) if stage == "tokenizer" else (4, cut))

    with pytest.raises(VqdeployError, match=r"holds a training that was cut.*--resume"):
        train(**options)
    with pytest.raises(VqdeployError, match="other options; expected seed 0, found seed 5"):
        train(**options, seed=5, resume=True)

    train(**options, resume=True)
    assert (tokenizer.count, prior.count) == (4, 5)
    assert load(tmp_path / "out").prior is not None
    assert not (tmp_path / "out.training").exists()


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


def test_diversity_sees_one_picture_for_a_class():
    torch.manual_seed(0)
    originals, labels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8), torch.arange(40) % 2
    one_picture = originals[:2].repeat(20, 1, 1, 1)
    assert diversity(originals, labels, originals, labels) == pytest.approx(1)
    assert diversity(one_picture, labels, originals, labels) == 0


def test_uint8_survives_the_range_of_the_model():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for pixel_range in ((-1.0, 1.0), (0.0, 1.0)):
        assert torch.equal(to_uint8(to_range(images, pixel_range), pixel_range), images)


# Data


def test_held_out_digits_are_fixed_balanced_and_apart():
    data = open_data("digits", 32)
    images, labels = images_of(data.held_out)
    assert torch.equal(images, images_of(open_data("digits", 32).held_out)[0])
    assert (len(data.train), len(images)) == (1437, 360)
    assert labels.bincount().min() >= 34
    training = {np.asarray(digit).tobytes() for digit in data.train.digits}
    assert not training & {np.asarray(digit).tobytes() for digit in data.held_out.digits}
    assert not torch.equal(data.train[0][0], data.train[0][0])


def test_image_folder_split(folder):
    data = open_data(str(folder), 32)
    assert (len(data.train), len(data.held_out)) == (11, 1)
    assert not set(data.train.files) & set(data.held_out.files)
    for image, label in (data.train[i] for i in range(11)):
        assert image.shape == (3, 32, 32)
        assert (image.float().mean() > 128) == label


# Refusals


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"model": "gan"}, "no model is called 'gan'"),
        (None, {"preset": "huge"}, "no preset 'huge'"),
        (None, {"preset": "cc3m-650m"}, "conditioned on text"),
        (None, {"data": "nowhere"}, "there is no such data; expected digits, photos or an image folder, found nowhere"),
        (None, {"resume": True}, "no training that was cut"),
        (None, {"steps": 0}, "steps"),
        (lambda path: path.mkdir(), {}, "holds too few images; expected 2 or more, found 0"),
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


def test_a_damaged_image_is_named(folder, tmp_path):
    (folder / "dark" / "9.png").write_bytes(b"not an image")
    with pytest.raises(VqdeployError, match=r"9\.png is not an image"):
        train(data=str(folder), output=tmp_path / "out")
    good = (folder / "dark" / "0.png").read_bytes()
    (folder / "dark" / "9.png").write_bytes(good[: len(good) // 2])
    files = open_data(str(folder), 32).train
    files.files = [(folder / "dark" / "9.png", 0)]
    with pytest.raises(VqdeployError, match=r"9\.png is a damaged image"):
        files[0]


def test_a_folder_with_something_else_is_refused_before_training(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(VqdeployError, match="holds something else"):
        train(output=tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


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
