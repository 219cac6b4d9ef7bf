"""FoundationVision/LlamaGen: the VQ-16 and VQ-8 tokenizers, also from files of Janus, and the priors."""

import re

from vqdeploy.convert.containers import Source
from vqdeploy.convert.conv import NO_SIZE, read_conv
from vqdeploy.convert.parts import Part, check, count, fit, learned, need, number, section, shape, submodel, take, whole
from vqdeploy.errors import ArtifactError
from vqdeploy.models.llamagen import EPSILON, ROTATION_BASE, LlamaGen, LlamaGenConfig
from vqdeploy.models.movq import MoVQ, MoVQConfig

TOKENIZER = r"(gen_vision_model\.)?encoder\.conv_blocks\.0\.res\.0\.norm1\.weight"
PRIOR = r"layers\.0\.attention\.wqkv\.weight"

_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 3200: 32, 4096: 32}  # of the published widths
_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


def tokenizer(source: Source) -> Part:
    """A tokenizer with unit codebook vectors. Attention follows the blocks of its last level.

    Raises:
        ArtifactError: A weight is missing, left over or of the wrong shape, or the configuration contradicts the
            weights.
    """
    if any(key.startswith("gen_vision_model.") for key in source.weights):
        source = submodel(source, "gen_vision_model.", "gen_vision_config")
    levels = sum(bool(re.fullmatch(r"encoder\.conv_blocks\.\d+\.res\.0\.conv1\.weight", key)) for key in source.weights)

    def public(ours: str) -> str:
        if ours.startswith("quantizer."):
            return "quantize.embedding.weight"
        name = re.sub(r"\.mid\.(\w+)\.", lambda match: f".mid.{_MIDDLE[match[1]]}.", ours)
        name = re.sub(
            r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.conv_blocks.{levels - 1 - int(match[1])}.", name
        )
        return re.sub(r"^encoder\.down\.", "encoder.conv_blocks.", name).replace(".block.", ".res.")

    declared = section(source.config, "codebook_size")
    size = whole(section(source.config, "image_size"), "image_size")
    conv = read_conv(source, public, size)
    codes, dim = shape(source, "quantize.embedding.weight")
    check(
        source,
        {
            "codebook_size": whole(declared, "codebook_size"),
            "codebook_embed_dim": whole(declared, "codebook_embed_dim"),
        },
        {"codebook_size": codes, "codebook_embed_dim": dim},
    )
    config = MoVQConfig(conv, codes, dim, groups=1, modulation=False, metric="cosine")
    given = learned(take(source, "quantize.embedding.weight"))
    weights = fit(source, lambda: MoVQ(config), public, given, r"^quantize\.codebook_used$")
    return Part("vqgan", config, weights, () if size else (NO_SIZE,))


def prior(sources: list[Source], tokenizer: Part) -> Part:
    """A prior for classes or texts. Its file gives neither the image size nor the number of heads.

    Raises:
        VqdeployError: The configurations do not give the image size or, for an unknown width, the number of heads.
        ArtifactError: It does not fit the tokenizer, shares keys among its heads, a weight is missing, left over or of
            the wrong shape, or the configuration contradicts the weights.
    """
    (source,) = sources
    conv, codes = tokenizer.config.conv, tokenizer.config.codebook_size
    need(None if NO_SIZE in tokenizer.notes else conv.resolution, "image_size", source, "--tokenizer-config")
    size, width = shape(source, "tok_embeddings.weight")
    layers = count(source, lambda i: f"layers.{i}.attention.wqkv.weight")
    if size != codes:
        raise ArtifactError(f"the prior in {source.path} is for another tokenizer", expected=codes, found=size)
    if tokenizer.config.metric != "cosine":
        raise ArtifactError(f"the prior in {source.path} is for another tokenizer", expected="one of LlamaGen's")
    declared = section(source.config, "block_size") | section(source.config, "n_head")
    heads = whole(declared, "n_head")
    heads = need(_HEADS.get(width) if heads is None else heads, "n_head", source, "--prior-config")
    if shape(source, "layers.0.attention.wqkv.weight")[0] != 3 * width:
        raise ArtifactError(f"the prior in {source.path} shares keys among its heads, which is not supported")
    texts = "cls_embedding.uncond_embedding" in source.weights
    length, text_width = shape(source, "cls_embedding.uncond_embedding") if texts else (1, 0)
    classes = 1 if texts else shape(source, "cls_embedding.embedding_table.weight")[0] - 1
    found = {
        "vocab_size": size,
        "dim": width,
        "n_layer": layers,
        "n_kv_head": heads,
        "block_size": conv.grid**2,
        "rope_base": ROTATION_BASE,
        "cls_token_num": length,
        **({"caption_dim": text_width} if texts else {"num_classes": classes}),
    }
    check(source, {key: whole(declared, key) for key in found}, found)
    check(source, {"norm_eps": number(declared, "norm_eps")}, {"norm_eps": EPSILON})
    config = LlamaGenConfig(
        (conv.grid, conv.grid, 1),
        size,
        width,
        layers,
        heads,
        shape(source, "layers.0.feed_forward.w1.weight")[0],
        classes=classes,
        condition_length=length,
        text_width=text_width,
    )
    weights = fit(source, lambda: LlamaGen(config), lambda ours: ours, ignored=r"^freqs_cis$")
    scale, top_k = (7.5, 1000) if texts else (4.0, 2000)  # of the public samplers
    return Part("llamagen", config, weights, sampling={"guidance_scale": scale, "top_k": min(top_k, size)})
