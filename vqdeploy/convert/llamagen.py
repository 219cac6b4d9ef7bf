"""FoundationVision/LlamaGen: the VQ-16 and VQ-8 tokenizers, also as Janus carries them in its own files."""

import re

from vqdeploy.convert.containers import Source
from vqdeploy.convert.conv import NO_SIZE, read_conv
from vqdeploy.convert.parts import Part, check, fit, learned, section, shape, submodel, take, whole
from vqdeploy.models.movq import MoVQ, MoVQConfig

TOKENIZER = r"(gen_vision_model\.)?encoder\.conv_blocks\.0\.res\.0\.norm1\.weight"

_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


def tokenizer(source: Source) -> Part:
    """A tokenizer, whose codes are unit vectors. Attention follows the blocks of its last level."""
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
