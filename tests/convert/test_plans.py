"""Imported weights in a plan of ONNX Runtime: what it computes is what the public code did."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.golden import read_golden, recorded_codes
from support.public import TOKENIZERS, write_system, write_tokenizer
from torch import Tensor, nn

from vqdeploy import checkpoint
from vqdeploy.convert.importer import import_checkpoint
from vqdeploy.engines.build import build
from vqdeploy.export.functions import OPSET
from vqdeploy.export.package import stages_of, write_package
from vqdeploy.export.stage import Stage
from vqdeploy.export.tokenizer import _laid_out
from vqdeploy.runtime import load
from vqdeploy.runtime.forcing import forced_logits, masked_logits
from vqdeploy.runtime.manifest import FORMAT, Manifest, Provenance
from vqdeploy.runtime.sampler import carried

pytestmark = pytest.mark.slow


def imported(arguments, folder):
    named = {"priors": []}
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        if option == "--prior":
            named["priors"].append(value)
        else:
            named[option.removeprefix("--").replace("-", "_")] = value
    import_checkpoint(folder / "checkpoint", **named)
    return checkpoint.load(folder / "checkpoint")


class Floats(nn.Module):
    """A tokenizer on images of floats, which the graphs of a plan lay out as integers, and on given codes."""

    def __init__(self, tokenizer: nn.Module):
        super().__init__()
        self.tokenizer = _laid_out(tokenizer)

    def forward(self, image: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        return self.tokenizer.encode(image), self.tokenizer.decode(codes)


def close(found, expected):
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


# Graphs that no other system has; the rest differ in little but names, and are slow.
GRAPHS = ("taming_vqgan_gumbel", "emu3_vq", "maskgit_jax_tokenizer")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in GRAPHS else pytest.mark.slow) for name in TOKENIZERS],
)
def test_tokenizer(tmp_path, name, monkeypatch):
    """Those with graphs that other tests have take one number of images: a graph for any number takes twice as long."""
    if name not in GRAPHS:
        static = torch.export.Dim.STATIC
        monkeypatch.setattr("torch.export.Dim", lambda *_, **__: static)
    system = imported(write_tokenizer(name, tmp_path), tmp_path)
    _, tensors, _ = read_golden(name)
    image, expected = tensors["in/image"], recorded_codes(tensors)
    codes = expected if name in ("rqvae", "vqvae2", "var_vae") else expected.view(len(image), *_grid(system, image), 1)
    stage = Stage("both", Floats(system.tokenizer), {"image": image, "codes": codes}, ["encoded", "decoded"])
    described = Manifest(FORMAT, name, "fp32", OPSET, Provenance("test"), (), {})
    write_package([stage], tmp_path / "package", described)
    build(tmp_path / "package", tmp_path / "plan")
    found = load(tmp_path / "plan", threads=1).run("both", image=image.numpy(), codes=codes.numpy())
    assert np.array_equal(found["encoded"], codes.numpy())
    decoded = found["decoded"].clip(-1, 1) if name == "var_vae" else found["decoded"]  # the original clips
    close(decoded, tensors["out/reconstruction"].numpy())


def _grid(system, image):
    factor = system.tokenizer.config.resolution // system.tokenizer.config.grid[0]
    return image.shape[2] // factor, image.shape[3] // factor


class Blank(nn.Module):
    """Zeros of a shape, as many as it is given."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype):
        super().__init__()
        self.shape, self.dtype = shape, dtype

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, :1] * 0).to(self.dtype).view(-1, *[1] * len(self.shape)).expand(-1, *self.shape)


def recorded_stages(system, precision, size, _):
    """Those of the prior: imported tokenizers have a test above, and features no recorded values."""
    encode, decode, *stages = stages_of(system, precision, size)
    image, codes = encode.inputs["image"][0], decode.inputs["codes"][0]
    encode = replace(encode, module=Blank(codes.shape, codes.dtype))
    decode = replace(decode, module=Blank(image.shape, image.dtype))
    return [encode, decode, *(stage for stage in stages if stage.name != "features")]


@pytest.fixture(scope="module")
def plan(artifacts, tmp_path_factory):
    """The plan of an imported system whose tokenizer is left out, and what the public code recorded."""
    opened = {}

    def of(name):
        if name not in opened:
            system = imported(write_system(name, folder := tmp_path_factory.mktemp(name)), folder)
            golden = read_golden("pixelsnail_top" if name == "pixelsnail" else name)
            system.config = replace(system.config, preset="prior")  # another package than that of the whole system
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("vqdeploy.export.package.stages_of", recorded_stages)
                opened[name] = artifacts.pipeline(system), golden[1]
        return opened[name]

    return of


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("rqtransformer", "vitvq_gpt")]
LLAMAGEN = ["llamagen_gpt", "llamagen_gpt_text"]
AUTOREGRESSIVE = ["taming_gpt", *SLOW]


def conditions(tensors):
    return tensors.get("in/class", tensors.get("in/caption")).numpy()


@pytest.mark.parametrize("name", [*AUTOREGRESSIVE, *LLAMAGEN])
def test_cached_steps_give_the_recorded_logits(plan, name):
    pipeline, tensors = plan(name)
    labels = conditions(tensors)
    codes = tensors["in/codes" if "in/codes" in tensors else "out/codes"].view(len(labels), *pipeline.grid).numpy()
    places = codes.reshape(len(labels), -1, pipeline.grid[-1])
    logits = forced_logits(pipeline, places, np.full_like(codes, -1), labels)
    close(logits.reshape(tensors["out/logits"].shape), tensors["out/logits"].numpy())


@pytest.mark.parametrize("name", AUTOREGRESSIVE[:2])
def test_greedy_codes(plan, name):
    pipeline, tensors = plan(name)
    codes = pipeline.generate(tensors["in/class"].tolist(), temperature=0.0).codes
    assert np.array_equal(codes.reshape(tensors["out/greedy_codes"].shape), tensors["out/greedy_codes"].numpy())


@pytest.mark.parametrize("name", LLAMAGEN)
def test_greedy_codes_with_guidance(plan, name):
    """Without guidance, with it, and with it for the first codes alone."""
    pipeline, tensors = plan(name)
    options = {"temperature": 0.0, "guidance_scale": tensors["in/cfg_scale"].item()}
    recorded = {"greedy_codes": {"guidance_scale": 1.0}, "greedy_codes_cfg": {}}
    if "in/cfg_interval" in tensors:
        recorded["greedy_codes_cfg_interval"] = {"guidance_interval": tensors["in/cfg_interval"].item()}
    for output, own in recorded.items():
        found = pipeline.generate(conditions(tensors), **options | own).codes
        assert np.array_equal(found.reshape(2, -1), tensors[f"out/{output}"].numpy()), output


def test_a_prior_without_a_null_label_has_no_guidance(plan):
    pipeline, _ = plan("taming_gpt")
    assert pipeline.sampling.no_label is None
    assert "guidance_scale" not in pipeline.sampling.options
    assert pipeline.manifest.provenance.source == "taming"


SLOW_MASKED = [pytest.param(name, marks=pytest.mark.slow) for name in ("maskgit_v1", "maskgit")]


@pytest.mark.parametrize("name", ["maskgit_jax_transformer", *SLOW_MASKED])
def test_masked_logits(plan, name):
    pipeline, tensors = plan(name)
    labels, size = tensors["in/class"].numpy(), pipeline.codebook_size
    codes = tensors["in/codes"].clamp(max=size).view(len(labels), *pipeline.grid).numpy()
    expected = tensors["out/logits"].view(*codes.shape, -1)[..., :size].numpy()
    close(masked_logits(pipeline, codes, labels), expected)
    if pipeline.sampling.no_label is not None:
        without = tensors["out/logits_unconditional"].view(*codes.shape, -1)[..., :size].numpy()
        close(masked_logits(pipeline, codes, labels, guidance_scale=2.5), without + 2.5 * (expected - without))


@pytest.mark.slow
def test_greedy_codes_of_the_top_level(plan):
    pipeline, tensors = plan("pixelsnail")
    expected = tensors["out/greedy_codes"].flatten(1).numpy()
    assert np.array_equal(pipeline.generate([0], temperature=0.0).codes[:, : expected.shape[1]], expected)


@pytest.mark.slow
def test_the_bottom_level_given_the_top(plan):
    pipeline, _ = plan("pixelsnail")
    _, tensors, _ = read_golden("pixelsnail_bottom")
    above, codes = (tensors[name].flatten(1).numpy() for name in ("in/condition", "in/codes"))
    known = np.concatenate([above, np.full_like(codes, -1)], 1)
    logits = forced_logits(pipeline, np.concatenate([above, codes], 1)[..., None], known, np.zeros(2, int))
    close(np.moveaxis(logits[:, :, 0], 1, 2).reshape(tensors["out/logits"].shape), tensors["out/logits"].numpy())
    greedy = tensors["out/greedy_codes"].flatten(1).numpy()
    found = pipeline.complete(known[: len(greedy)], [0] * len(greedy), temperature=0.0).codes
    assert np.array_equal(found[:, above.shape[1] :], greedy)


@pytest.mark.slow
def test_greedy_codes_of_a_token_shift_that_the_public_sampler_drops(plan, tmp_path, monkeypatch):
    """Its cached steps mix each entry with zeros in place of the one before, unlike its full pass."""
    pipeline, tensors = plan("vitvq_gpt")
    labels, expected = tensors["in/class"].tolist(), tensors["out/greedy_codes"].numpy()
    codes = pipeline.generate(labels, temperature=0.0).codes
    prior = imported(write_system("vitvq_gpt", tmp_path), tmp_path).prior
    full_pass = prior.logits(torch.from_numpy(codes), tensors["in/class"]).argmax(-1)
    assert np.array_equal(full_pass, codes)

    def unshifted(binding):
        return {name: state for name, state in carried(binding).items() if not name.startswith("past_entry")}

    monkeypatch.setattr("vqdeploy.runtime.autoregressive.carried", unshifted)
    found = load(pipeline.bundle.path, threads=1).generate(labels, temperature=0.0).codes
    assert np.array_equal(found.reshape(expected.shape), expected)
