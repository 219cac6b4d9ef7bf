"""Published parameter counts, on the meta device."""

import math

import pytest
import torch
from torch import nn

from vqdeploy.errors import VqdeployError
from vqdeploy.models.pixelsnail import CausalConv, CodeConv, PixelSNAIL
from vqdeploy.systems import SYSTEMS, System, preset

PRESETS = {name: definition.presets for name, definition in SYSTEMS.items()}

# Millions of parameters: tokenizer (codebook included, as published), prior.
COUNTS = {
    "ffhq-350m": (100.732, 355.394),
    "church-350m": (104.402, 370.088),
    "cat-600m": (104.402, 612.061),
    "bedroom-600m": (104.402, 612.061),
    "imagenet-480m": (104.402, 480.921),
    "imagenet-800m": (104.402, 820.899),
    "imagenet-1400m": (104.402, 1387.530),
    "imagenet-3800m": (104.402, 3822.488),
    "cc3m-650m": (104.402, 654.062),
    "f16": (76.074, None),
    "f8": (74.301, None),
}


MOVQ_COUNTS = {
    "67m": (67.832, None),
    "102m": (101.614, None),
    "270m": (270.669, None),
    "vqgan-f16-1024": (72.142, None),
    "vqgan-f16-16384": (76.074, None),
    # The prior as published; the tokenizer as we count it.
    "halton-large": (71.883, 479.985),
    # Our reading of the paper, which gives 82.7M and 307M and too few details to tell where they are.
    "paper": (78.261, 308.848),
}


# Without the positions of the tokenizers, which are constants.
VITVQGAN_COUNTS = {
    "small": (50.908, None),
    "base": (170.664, None),
    "large": (613.488, None),
    # The priors in the layout of a plain GPT; the paper says 650M and 1697M and not how.
    "vim-base": (170.664, 708.237),
    "vim-large": (613.488, 1850.606),
}

# The public GPT keeps classes among the codes, and places of positions that are not used; see the test.
VQGAN_COUNTS = {"faces": (72.142, 304.933), "imagenet": (76.074, 1410.641)}

# Weights of two-level tokenizers without and with what the averages keep, and of the networks of the prior.
VQVAE2_COUNTS = {"ffhq": (1.389, 1.521, 84.873, 89.763)}


# The null text is a buffer, and so not counted.
LLAMAGEN_COUNTS = {
    "b-256": (71.883, 110.888),
    "b-384": (71.883, 110.888),
    "l-256": (71.883, 342.911),
    "l-384": (71.883, 342.911),
    "xl-384": (71.883, 774.700),
    "xxl-384": (71.883, 1410.973),
    "3b-384": (71.883, 3096.659),
    "text-xl-256": (71.883, 777.678),
    "text-xl-512": (71.883, 777.678),
    "vq-16": (71.883, None),
    "vq-8": (70.110, None),
}

# The public README rounds them to 310M, 600M, 1.0B, 2.0B and 2.3B.
VAR_COUNTS = {
    "d16": (108.948, 310.284),
    "d20": (108.948, 600.917),
    "d24": (108.948, 1033.399),
    "d30": (108.948, 2010.020),
    "d36-s": (108.948, 2353.894),
}


def test_every_published_preset_is_counted():
    assert set(PRESETS["llamagen"]) == {*LLAMAGEN_COUNTS, "tiny", "emoji", "bench"}
    assert set(PRESETS["var"]) == {*VAR_COUNTS, "tiny", "emoji", "bench"}
    assert set(PRESETS["vqvae2"]) == {*VQVAE2_COUNTS, "tiny", "bench"}
    assert set(PRESETS["vitvqgan"]) == {*VITVQGAN_COUNTS, "tiny", "bench"}
    assert set(PRESETS["vqgan"]) == {*VQGAN_COUNTS, "tiny"}
    assert set(PRESETS["rqvae"]) == {*COUNTS, "tiny", "emoji", "bench"}
    assert set(PRESETS["movq"]) == {*MOVQ_COUNTS, "tiny", "emoji", "bench"}


def count(model, name):
    """The configuration, parameters of the tokenizer with its codebook, and parameters of the prior."""
    with torch.device("meta"):
        system = System(preset(model, name))
    tokenizer = sum(p.numel() for p in system.tokenizer.parameters()) + system.tokenizer.quantizer.codebook.numel()
    return system.config, tokenizer, system.prior and sum(p.numel() for p in system.prior.parameters())


def check(tokenizer, prior, expected):
    assert tokenizer / 1e6 == pytest.approx(expected[0], abs=6e-4)
    assert (prior and prior / 1e6) == (expected[1] and pytest.approx(expected[1], abs=6e-4))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    config, tokenizer, prior = count("rqvae", name)
    check(tokenizer + config.tokenizer.code_dim, prior, COUNTS[name])  # published with a padding row of the codebook


@pytest.mark.parametrize("name", MOVQ_COUNTS)
def test_parameter_count_of_masked_systems(name):
    check(*count("movq", name)[1:], MOVQ_COUNTS[name])


@pytest.mark.parametrize("name", VITVQGAN_COUNTS)
def test_parameter_count_of_vitvqgan(name):
    config, tokenizer, prior = count("vitvqgan", name)
    widths = config.tokenizer.encoder.width + config.tokenizer.decoder.width
    check(tokenizer - math.prod(config.tokenizer.grid) * widths, prior, VITVQGAN_COUNTS[name])


@pytest.mark.parametrize(("name", "places"), [("faces", 512), ("imagenet", 256)])
def test_parameter_count_of_vqgan(name, places):
    config, tokenizer, prior = count("vqgan", name)
    ours = config.prior.classes + 1 + 1 + config.prior.positions  # rows of labels and of places
    check(tokenizer, prior + (places - ours) * config.prior.width, VQGAN_COUNTS[name])


@pytest.mark.parametrize("name", LLAMAGEN_COUNTS)
def test_parameter_count_of_llamagen(name):
    check(*count("llamagen", name)[1:], LLAMAGEN_COUNTS[name])


def public_size(network: PixelSNAIL) -> int:
    """Parameters of the public network: scales of weight normalization, and the taps that we leave out."""
    size = sum(p.numel() for p in network.parameters())
    kernel, table = network.config.kernel, network.entry.codes.weight[0].numel()
    for module in network.modules():
        if isinstance(module, CausalConv):
            forbidden = module.left.weight[:, :, 0, 0].numel() * (kernel - kernel // 2)
            size += forbidden - module.left.out_channels
        if isinstance(module, nn.Conv2d | nn.Linear):
            size += len(module.weight)
        if isinstance(module, CodeConv):
            size += module.weight.shape[-1]
    # The first layer is two convolutions, each with a scale, that share taps.
    return size + network.config.channels + table * (kernel // 2) ** 2


@pytest.mark.parametrize("name", VQVAE2_COUNTS)
def test_parameter_count_of_vqvae2(name):
    with torch.device("meta"):
        system = System(preset("vqvae2", name))
    tokenizer = system.tokenizer
    sizes = [
        sum(p.numel() for p in tokenizer.parameters()),
        sum(p.numel() for p in tokenizer.state_dict().values()),
        *map(public_size, system.prior.levels),
    ]
    assert [size / 1e6 for size in sizes] == pytest.approx(VQVAE2_COUNTS[name], abs=6e-4)


ALL = [
    (model, name)
    for model in ("movq", "vitvqgan", "vqgan", "vqvae2", "maskgit", "emu3", "llamagen")
    for name in PRESETS[model]
]


@pytest.mark.parametrize(("model", "name"), ALL)
def test_tokenizer_and_prior_fit(model, name):
    config = preset(model, name)
    if config.prior:
        assert config.prior.grid == config.tokenizer.grid
        assert getattr(config.prior, "level_grids", ()) == getattr(config.tokenizer, "level_grids", ())
        assert config.prior.codebook_size == config.tokenizer.codebook_size


def test_unknown_names_list_the_known_ones():
    known = "emu3 or llamagen or maskgit or movq or rqvae or var or vitvqgan or vqgan or vqvae2"
    with pytest.raises(VqdeployError, match=f"expected {known}"):
        preset("rqvea", "tiny")
    with pytest.raises(VqdeployError, match="imagenet-480m"):
        preset("rqvae", "huge")


@pytest.mark.parametrize("name", VAR_COUNTS)
def test_var(name):
    config, tokenizer, prior = count("var", name)
    check(tokenizer, prior, VAR_COUNTS[name])
    assert config.tokenizer.sides == config.prior.sides
    assert config.tokenizer.resolution == 16 * config.prior.sides[-1]
