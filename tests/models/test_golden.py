"""The public implementations' outputs, reproduced from the same weights."""

import math

import pytest
import torch
from support.golden import assert_close, read_golden

from vqdeploy.convert.vq_vae_2 import prior_weights, tokenizer_weights
from vqdeploy.models.adaptive_maskgit import AdaptiveMaskGIT
from vqdeploy.models.conv import ConvConfig
from vqdeploy.models.gpt import GPT, GPTConfig
from vqdeploy.models.maskgit import MaskGITConfig
from vqdeploy.models.movq import MoVQ, MoVQConfig
from vqdeploy.models.pixelsnail import PixelSNAIL, PixelSNAILConfig
from vqdeploy.models.rqtransformer import RQTransformer, RQTransformerConfig
from vqdeploy.models.rqvae import RQVAE, RQVAEConfig
from vqdeploy.models.vitvqgan import ViTConfig, ViTVQGAN, ViTVQGANConfig
from vqdeploy.models.vqvae2 import VQVAE2, VQVAE2Config, split_levels


def conv_config(public: dict) -> ConvConfig:
    return ConvConfig(
        public["resolution"],
        public["ch"],
        tuple(public["ch_mult"]),
        public["num_res_blocks"],
        tuple(public["attn_resolutions"]),
        public["z_channels"],
    )


@pytest.fixture(scope="module")
def rqvae():
    config, tensors, state = read_golden("rqvae")
    model = RQVAE(
        RQVAEConfig(
            conv=conv_config(config["ddconfig"]),
            codebook_size=config["n_embed"],
            code_dim=config["embed_dim"],
            depth=config["code_shape"][-1],
        )
    ).eval()
    public = "quantizer.codebooks.0."
    quantizer = {
        "quantizer.codebook": state[public + "weight"][:-1],  # the last row is padding
        "quantizer.embed_ema": state[public + "embed_ema"],
        "quantizer.cluster_size_ema": state[public + "cluster_size_ema"],
    }
    model.load_state_dict({key: w for key, w in state.items() if not key.startswith("quantizer.")} | quantizer)
    return model, tensors


@torch.no_grad()
def test_rqvae(rqvae):
    model, tensors = rqvae
    assert_close(model.latents(tensors["in/image"]), tensors["out/z"])
    codes, quantized = model.quantizer.encode(model.latents(tensors["in/image"]))
    assert torch.equal(codes, tensors["out/codes"])
    assert_close(quantized, tensors["out/z_q"])
    assert_close(model.decode(codes), tensors["out/decode_code"])
    assert_close(model(tensors["in/image"])[0], tensors["out/reconstruction"])


@pytest.fixture(scope="module")
def rqtransformer():
    config, tensors, state = read_golden("rqtransformer")
    model = RQTransformer(
        RQTransformerConfig(
            grid=tuple(config["block_size"]),
            codebook_size=config["vocab_size"],
            code_dim=config["input_embed_dim"],
            width=config["embed_dim"],
            body_layers=config["body"]["n_layer"],
            head_layers=config["head"]["n_layer"],
            heads=config["body"]["block"]["n_head"],
            classes=config["vocab_size_cond"],
        ),
        tensors["in/codebook"],
    ).eval()
    model.load_state_dict(state)
    return model, tensors


@torch.no_grad()
def test_rqtransformer_logits(rqtransformer):
    model, tensors = rqtransformer
    assert_close(model.logits(tensors["in/codes"], tensors["in/class"]), tensors["out/logits"])


def test_rqtransformer_greedy_codes(rqtransformer):
    model, tensors = rqtransformer
    labels, config = tensors["in/class"], model.config
    batch, shape = len(labels), (len(labels), config.depth)
    noise = torch.zeros(config.positions, batch, config.depth, config.codebook_size)
    options = torch.ones(shape), torch.ones(shape, dtype=torch.int64), torch.ones(shape)
    assert torch.equal(model.generate(labels, noise.__getitem__, *options), tensors["out/greedy_codes"])


def read_movq(name: str, modulation: bool):
    config, tensors, state = read_golden(name)
    model = MoVQ(
        MoVQConfig(
            conv=conv_config(config["ddconfig"]),
            codebook_size=config["n_embed"],
            code_dim=config["embed_dim"],
            groups=1,
            modulation=modulation,
        )
    ).eval()
    codebook = state.pop("quantize.embedding.weight")
    learned = {"quantizer.embed_ema": codebook, "quantizer.cluster_size_ema": torch.ones(len(codebook))}
    model.load_state_dict(state | {"quantizer.codebook": codebook} | learned)
    return model, tensors


@pytest.mark.parametrize(("name", "modulation"), [("movq", True), ("vqgan", False)])
@torch.no_grad()
def test_movq_with_one_group(name, modulation):
    model, tensors = read_movq(name, modulation)
    codes, quantized = model.quantizer.encode(model.latents(tensors["in/image"]))
    assert torch.equal(codes[..., 0], tensors["out/codes"])
    assert_close(quantized.permute(0, 3, 1, 2), tensors["out/z_q"])
    assert_close(model.decode(codes), tensors["out/reconstruction"])
    assert_close(model(tensors["in/image"])[0], tensors["out/reconstruction"])


@torch.no_grad()
def test_adaptive_maskgit():
    config, tensors, state = read_golden("maskgit")
    size = config["input_size"]
    model = AdaptiveMaskGIT(
        MaskGITConfig(
            grid=(size, size, 1),
            codebook_size=config["codebook_size"],
            width=config["hidden_dim"],
            layers=config["depth"],
            heads=config["heads"],
            classes=config["nclass"],
            network="adaptive",
        )
    ).eval()
    model.load_state_dict(state)
    codes, labels = tensors["in/codes"][..., None], tensors["in/class"]
    assert_close(model.logits_with_mask(codes, labels), tensors["out/logits"])
    no_label = torch.full_like(labels, config["nclass"])
    assert_close(model.logits_with_mask(codes, no_label), tensors["out/logits_unconditional"])
    assert torch.equal(
        model.logits(codes, labels).flatten(1, 3), model.logits_with_mask(codes, labels)[..., : config["codebook_size"]]
    )


@torch.no_grad()
def test_vitvqgan():
    config, tensors, state = read_golden("vitvq")

    def shape(part: dict) -> ViTConfig:
        return ViTConfig(part["dim"], part["depth"], part["heads"], part["mlp_dim"])

    model = ViTVQGAN(
        ViTVQGANConfig(
            config["image_size"],
            config["patch_size"],
            shape(config["encoder"]),
            shape(config["decoder"]),
            config["quantizer"]["n_embed"],
            config["quantizer"]["embed_dim"],
        )
    ).eval()
    assert_close(model.encoder.en_pos_embedding, state["encoder.en_pos_embedding"])
    codebook = state.pop("quantizer.embedding.weight")
    learned = {"quantizer.embed_ema": codebook, "quantizer.cluster_size_ema": torch.ones(len(codebook))}
    model.load_state_dict(state | {"quantizer.codebook": codebook} | learned)
    codes, quantized = model.quantizer.encode(model.latents(tensors["in/image"]))
    assert torch.equal(codes.flatten(1), tensors["out/codes"])
    assert_close(quantized.flatten(1, 2), tensors["out/z_q"])
    assert_close(model.decode(codes), tensors["out/decode_code"])
    assert_close(model(tensors["in/image"])[0], tensors["out/reconstruction"])


@pytest.fixture(scope="module")
def gpt():
    config, tensors, state = read_golden("vitvq_gpt")
    side = math.isqrt(config["img_num_tokens"])
    model = GPT(
        GPTConfig(
            grid=(side, side, 1),
            codebook_size=config["vocab_img_size"],
            width=config["embed_dim"],
            layers=config["n_layers"],
            heads=config["n_heads"],
            classes=config["vocab_cond_size"] - 1,  # the last stands for no class
            token_shift=True,
            squared_relu=True,
        )
    ).eval()
    renamed = {key.replace("blocks.", "transformer.blocks.", 1): weight for key, weight in state.items()}
    renamed = {key.replace(".mlp.p0.", ".mlp.0.").replace(".mlp.p1.", ".mlp.2."): w for key, w in renamed.items()}
    model.load_state_dict(renamed)
    return model, tensors, side


@torch.no_grad()
def test_gpt_logits(gpt):
    model, tensors, side = gpt
    codes = tensors["in/codes"].view(-1, side, side, 1)
    assert_close(model.logits(codes, tensors["in/class"]).flatten(1, 3), tensors["out/logits"])


def test_gpt_cached_sampling_is_that_of_the_full_forward_pass(gpt):
    """The public code's own cached sampler forgets its token shift, so its greedy codes are not reproduced."""
    model, tensors, _ = gpt
    labels, size = tensors["in/class"], model.config.codebook_size
    options = [torch.ones(len(labels), 1), torch.ones(len(labels), 1, dtype=torch.int64), torch.ones(len(labels), 1)]
    for scale in (1.0, 2.5):
        codes = model.generate(labels, lambda position: torch.zeros(len(labels), 1, size), *options, scale)
        with torch.no_grad():
            logits = model.logits(codes, labels)
            without = model.logits(codes, torch.full_like(labels, model.config.classes))
        assert torch.equal((without + scale * (logits - without)).argmax(-1), codes)


@torch.no_grad()
def test_vqvae2():
    config, tensors, state = read_golden("vqvae2")
    image = tensors["in/image"]
    model = VQVAE2(
        VQVAE2Config(
            resolution=image.shape[-1],
            channels=config["channel"],
            res_blocks=config["n_res_block"],
            res_channels=config["n_res_channel"],
            codebook_size=config["n_embed"],
            code_dim=config["embed_dim"],
        )
    ).eval()
    model.load_state_dict(tokenizer_weights(state))
    codes = model.encode(image)
    top, bottom = split_levels(codes, model.config.level_grids)
    assert torch.equal(top, tensors["out/codes_top"])
    assert torch.equal(bottom, tensors["out/codes_bottom"])
    assert_close(model.decode(codes), tensors["out/decode_code"])
    assert_close(model(image)[0], tensors["out/reconstruction"])


@pytest.fixture(params=["pixelsnail_top", "pixelsnail_bottom"])
@torch.no_grad()
def pixelsnail(request):
    """The network of one level, its condition, and the tensors."""
    config, tensors, state = read_golden(request.param)
    shape = PixelSNAILConfig(
        grid=tuple(config["shape"]),
        channels=config["channel"],
        kernel=config["kernel_size"],
        blocks=config["n_block"],
        res_blocks=config["n_res_block"],
        res_channels=config["res_channel"],
        attention=config["attention"],
        out_res_blocks=config["n_out_res_block"],
        condition_channels=config["cond_res_channel"],
        condition_kernel=config["cond_res_kernel"],
        condition_res_blocks=config["n_cond_res_block"],
    )
    above = tensors.get("in/condition")
    model = PixelSNAIL(shape, config["n_class"], finer=above is not None).eval()
    model.load_state_dict(prior_weights(state))
    assert_close(model.background, state["background"])
    no_labels = torch.zeros(2, dtype=torch.int64)
    return model, model.embed_condition(no_labels, above), tensors


@torch.no_grad()
def test_pixelsnail_logits(pixelsnail):
    model, condition, tensors = pixelsnail
    assert_close(model(tensors["in/codes"], condition).permute(0, 3, 1, 2), tensors["out/logits"])


@torch.no_grad()
def test_pixelsnail_greedy_codes(pixelsnail):
    model, condition, tensors = pixelsnail
    expected = tensors["out/greedy_codes"]
    first = condition if condition is None else condition[: len(expected)]
    codes = model.generate(len(expected), first, lambda position, logits: logits.argmax(-1))
    assert torch.equal(codes, expected)
