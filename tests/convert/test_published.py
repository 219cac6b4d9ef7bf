"""The weights that public files of the published sizes hold, by name and shape: all are asked for, and none is over.

The lists in tests/keys were taken from the public constructors. No published file was read.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from vqdeploy.convert.containers import Source
from vqdeploy.convert.importer import PRIORS, TOKENIZERS, _format
from vqdeploy.errors import ArtifactError
from vqdeploy.systems import System, SystemConfig, preset

KEYS = Path(__file__).parents[1] / "keys"


def listed(name, header):
    """The section of a list whose header has this text; tensors take no memory."""
    lines = iter((KEYS / f"{name}.txt").read_text().splitlines())
    for line in lines:
        if line.startswith("#") and header in line:
            break
    weights = {}
    for line in lines:
        if not line or line.startswith("#"):
            if weights:
                break
            continue
        key, shape = line.split("\t")[:2]
        weights[key] = torch.zeros(()).expand(json.loads(shape))
    assert weights
    return weights


def tokenizer_of(weights, config=None):
    source = Source(Path("file"), dict(weights), "", config)
    name = _format(source, TOKENIZERS, "tokenizer", None)
    return name, TOKENIZERS[name].read(source)


def prior_of(tokenizer, *lists, config=None):
    sources = [Source(Path("file"), dict(weights), "", config) for weights in lists]
    name = _format(sources[0], PRIORS, "prior", None)
    return name, PRIORS[name].read(sources, tokenizer)


def millions(part):
    fixed = ("_ema", "_pos_embedding")
    counted = {key: w for key, w in part.weights.items() if not key.endswith(fixed)}
    return round(sum(w.numel() for w in counted.values()) / 1e6, 3)


def made(part, tokenizer=None):
    """The system of a part, without memory: its configuration is one that can be built."""
    own = part if tokenizer is None else tokenizer
    config = SystemConfig(part.model, "imported", own.config, None if tokenizer is None else part.config)
    with torch.device("meta"):
        system = System(config)
    expected = (system.tokenizer if tokenizer is None else system.prior).state_dict()
    assert {key: w.shape for key, w in part.weights.items()} == {key: w.shape for key, w in expected.items()}


SIZES = [  # list, section, format, parameters in millions as published or counted, and what its shape should be
    ("rqvae_rqtransformer", "Stage-1 ImageNet", "rq-vae-transformer", 104.402, {"attention_resolutions": (8,)}),
    ("movqgan", "MoVQGAN 67M", "movqgan", 67.832, {"attention_resolutions": (32,), "latent_channels": 4}),
    ("movqgan", "huggingface/diffusers", "diffusers", 67.832, {"attention_resolutions": (32,)}),
    ("vqgan_taming", "ImageNet f16 K=1024", "taming", 72.142, {"attention_resolutions": (16,)}),
    ("llamagen_vq", "vq_ds16_c2i", "llamagen", 71.883, {"attention_resolutions": (16,)}),
    ("vitvqgan_vim", "ViT-VQGAN base", "enhancing-transformers", 170.664, None),
    ("vqvae2_pixelsnail", "vqvae_560", "vq-vae-2", 1.455, None),
    ("maskgit", "tokenizer_imagenet256", "maskgit-jax", 54.516, None),
    ("maskgit", "openMUSE", "maskgit-jax", 54.516, None),
]


@pytest.mark.parametrize(("name", "section", "expected", "parameters", "shape"), SIZES)
def test_tokenizers(name, section, expected, parameters, shape):
    weights = listed(name, section)
    found, part = tokenizer_of(weights)
    assert found == expected
    made(part)
    assert millions(part) == pytest.approx(parameters, abs=0.07)
    if shape:
        assert {key: getattr(part.config.conv, key) for key in shape} == shape


def test_training_leftovers_are_known(monkeypatch):
    weights = listed("vqgan_taming", "ImageNet f16 K=1024")
    leftovers = {"loss.perceptual_loss.net.0.weight": torch.ones(2), "loss.discriminator.main.3.num_batches_tracked": 1}
    assert tokenizer_of(weights | leftovers)[0] == "taming"
    assert tokenizer_of({f"first_stage_model.{key}": weight for key, weight in weights.items()})[0] == "taming"
    janus = {f"gen_vision_model.{key}": w for key, w in listed("llamagen_vq", "vq_ds16_c2i").items()}
    assert tokenizer_of(janus | {"language_model.model.norm.weight": torch.ones(3)})[0] == "llamagen"


@pytest.fixture(scope="module")
def rqvae():
    return tokenizer_of(listed("rqvae_rqtransformer", "Stage-1 ImageNet"))[1]


def test_rqtransformers(rqvae):
    weights = listed("rqvae_rqtransformer", "Stage-2 RQ-Transformer ImageNet 1400M")
    name, part = prior_of(rqvae, weights)
    assert name == "rq-vae-transformer"
    made(part, rqvae)
    assert millions(part) == 1387.530
    assert (part.config.heads, part.config.body_layers, part.config.head_layers) == (24, 42, 6)

    width = 1280  # the model for CC3M: 26 layers of text-conditioned body, 4 of head
    text = {}
    for key, weight in weights.items():
        match = re.match(r"(body|head)_transformer\.blocks\.(\d+)", key)
        if match is None or int(match[2]) < {"body": 26, "head": 4}[match[1]]:
            text[key] = torch.zeros(()).expand([{1536: width, 6144: 4 * width}.get(n, n) for n in weight.shape])
    text["pos_emb_cond"] = torch.zeros(()).expand(1, 32, width)
    text["cond_emb.weight"] = torch.zeros(()).expand(16384, width)
    for key, shape in (("layer_norm.weight", [width]), ("layer_norm.bias", [width]), ("linear.bias", [16384])):
        text[f"cond_classifier.{key}"] = torch.zeros(()).expand(shape)
    text["cond_classifier.linear.weight"] = torch.zeros(()).expand(16384, width)
    part = prior_of(rqvae, text)[1]
    made(part, rqvae)
    assert millions(part) == 654.062
    assert part.config.condition_length == 32


def test_net2net():
    tokenizer = tokenizer_of(listed("vqgan_taming", "ImageNet f16 K=1024"))[1]
    config = {"n_head": 16, "cond_stage_config": {"target": "taming.modules.util.SOSProvider", "params": {}}}
    part = prior_of(tokenizer, listed("vqgan_taming", "Net2NetTransformer"), config=config)[1]
    made(part, tokenizer)
    assert (part.config.width, part.config.layers, part.config.classes) == (1024, 24, 1)


def test_vim():
    tokenizer = tokenizer_of(listed("vitvqgan_vim", "ViT-VQGAN base"))[1]
    weights = listed("vitvqgan_vim", "Stage 2 CondTransformer")
    part = prior_of(tokenizer, weights, config={"n_heads": 16})[1]
    made(part, tokenizer)
    assert (part.config.width, part.config.layers, part.config.classes) == (1536, 24, 1000)


def test_pixelsnail():
    tokenizer = tokenizer_of(listed("vqvae2_pixelsnail", "vqvae_560"))[1]
    top, bottom = (listed("vqvae2_pixelsnail", f"pixelsnail_{level}_XXX") for level in ("top", "bottom"))
    lists = [{key: w.to("meta") for key, w in weights.items()} for weights in (bottom, top)]
    name, part = prior_of(tokenizer, *lists)
    assert name == "vq-vae-2"
    made(part, tokenizer)
    assert [(level.grid, level.attention) for level in part.config.levels] == [((32, 32), True), ((64, 64), False)]


def test_maskgit():
    tokenizer = tokenizer_of(listed("maskgit", "tokenizer_imagenet256"))[1]
    part = prior_of(tokenizer, listed("maskgit", "maskgit_imagenet256"))[1]
    made(part, tokenizer)
    assert (part.config.heads, part.config.classes, part.config.grid) == (16, 1000, (16, 16, 1))

    tokenizer = tokenizer_of(listed("vqgan_taming", "ImageNet f16 K=1024"))[1]
    part = prior_of(tokenizer, listed("maskgit", "MaskGIT_ImageNet_256"))[1]
    made(part, tokenizer)
    assert (part.config.network, part.config.classes, part.config.heads) == ("class-last", 1000, 16)

    tokenizer = tokenizer_of(listed("llamagen_vq", "vq_ds16_c2i"), {"image_size": 384})[1]
    part = prior_of(tokenizer, listed("maskgit", "Halton-MaskGIT v2 large"))[1]
    made(part, tokenizer)
    assert millions(part) - part.weights["tok_emb.weight"].numel() / 1e6 == pytest.approx(479.985, abs=0.03)


@pytest.mark.parametrize(("size", "grid"), [(256, 16), (384, 24), (512, 32)])
def test_llamagen_at_every_image_size(size, grid):
    tokenizer = tokenizer_of(listed("llamagen_vq", "vq_ds16_c2i"), {"image_size": size})[1]
    part = prior_of(tokenizer, listed("llamagen_gpt", "c2i_L_384"))[1]
    made(part, tokenizer)
    assert millions(part) == 342.911
    assert (part.config.grid, part.config.heads, part.config.classes) == ((grid, grid, 1), 16, 1000)


def test_llamagen_of_texts():
    tokenizer = tokenizer_of(listed("llamagen_vq", "vq_ds16_c2i"), {"image_size": 512})[1]
    part = prior_of(tokenizer, listed("llamagen_gpt_t2i", "t2i_XL_stage1_256"))[1]
    made(part, tokenizer)
    assert millions(part) - 120 * 2048 / 1e6 == pytest.approx(777.678, abs=6e-4)
    assert (part.config.heads, part.config.condition_length, part.config.text_width) == (20, 120, 2048)


@pytest.mark.parametrize(
    ("section", "name", "parameters", "sides"),
    [
        ("var_d16.pth", "d16", 310.284, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
        ("var_d36.pth", "d36-s", 2353.894, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
    ],
)
def test_var(section, name, parameters, sides):
    tokenizer = tokenizer_of(listed("var", "vae_ch160v4096z32.pth"))[1]
    assert millions(tokenizer) == pytest.approx(108.948, abs=6e-4)
    weights = listed("var", section)
    weights["lvl_1L"] = torch.cat([torch.full((side**2,), scale) for scale, side in enumerate(sides)])[None]
    part = prior_of(tokenizer, weights)[1]
    expected = preset("var", name)
    assert (part.config, part.tokenizer) == (expected.prior, expected.tokenizer)
    assert sum(w.numel() for w in part.weights.values()) / 1e6 == pytest.approx(parameters, abs=6e-4)


def test_llamagen_with_the_configuration_of_its_publishers():
    """As the public ModelArgs writes it, with its defaults."""
    config = {
        "dim": 1024, "n_layer": 24, "n_head": 16, "n_kv_head": None, "multiple_of": 256, "rope_base": 10000,
        "norm_eps": 1e-5, "num_classes": 1000, "caption_dim": 2048, "class_dropout_prob": 0.1, "model_type": "c2i",
        "vocab_size": 16384, "cls_token_num": 1, "block_size": 576,
    }  # fmt: skip
    weights = listed("llamagen_gpt", "c2i_L_384")
    tokenizer = tokenizer_of(listed("llamagen_vq", "vq_ds16_c2i"), {"image_size": 384})[1]
    assert prior_of(tokenizer, weights, config=config)[1].config.heads == 16
    smaller = tokenizer_of(listed("llamagen_vq", "vq_ds16_c2i"), {"image_size": 256})[1]
    with pytest.raises(ArtifactError, match="block_size differs; expected 256, found 576"):
        prior_of(smaller, weights, config=config)
