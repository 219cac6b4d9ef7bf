"""google-research/maskgit: the tokenizer and the transformer, flax files; also the tokenizer port of open-muse.

Flax numbers layers in order of their creation. Kernels of convolutions are stored [height, width, inputs, outputs],
those of linear layers [inputs, outputs].
"""

import re

import torch
from torch import Tensor

from vqdeploy.convert.containers import Source, Weights
from vqdeploy.convert.conv import DEFAULT_RESOLUTION, NO_SIZE
from vqdeploy.convert.parts import Part, check, count, fit, learned, section, shape, square, take, whole
from vqdeploy.errors import ArtifactError
from vqdeploy.models.bert_maskgit import BertMaskGIT
from vqdeploy.models.maskgit import MaskGITConfig
from vqdeploy.models.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig

TOKENIZER = r"(params/)?encoder/ResBlock_0/|decoder\.up\.1\.upsample_conv\.weight"
PRIOR = r"(params/)?Embed_0/word_embeddings/embedding"

_TRANSFORMER = (
    (r"^norm\.", "Embed_0/embeddings_ln/"),
    (r"^pos_emb$", "Embed_0/position_embeddings/embedding"),
    (r"\.attn\.proj\.", "/Attention_0/self_attention/out/"),
    (r"\.attn\.(\w+)\.", r"/Attention_0/self_attention/\1/"),
    (r"\.ln1\.", "/Attention_0/attention_output_ln/"),
    (r"\.mlp\.0\.", "/Mlp_0/intermediate_output/"),
    (r"\.mlp\.2\.", "/Mlp_0/layer_output/"),
    (r"\.ln2\.", "/Mlp_0/layer_output_ln/"),
    (r"^transformer\.blocks\.(\d+)", r"TransformerLayer_\1"),
    (r"^head\.0\.", "MlmLayer_0/mlm_dense/"),
    (r"^head\.2\.", "MlmLayer_0/mlm_ln/"),
)


def tokenizer(source: Source) -> Part:
    """The tokenizer. The image size is not in the file: the network is the same for 256 and 512 pixels.

    Raises:
        ArtifactError: A weight is missing, left over or of the wrong shape, or `image_size` of the configuration is
            malformed.
    """
    flax = "encoder.conv_in.weight" not in source.weights
    codebook_name = "quantizer/codebook" if flax else "quantize.embedding.weight"
    if flax:
        source.weights = {key.removeprefix("params/"): weight for key, weight in source.weights.items()}
    book = take(source, codebook_name)
    size = whole(section(source.config, "image_size"), "image_size")
    config = _tokenizer_config(source, flax, book, size or DEFAULT_RESOLUTION)
    levels, blocks = len(config.channel_multipliers), config.res_blocks

    def public(ours: str) -> str:
        return _flax_name(ours, levels, blocks) if flax else ours

    if flax:
        source.weights = {key: _kernel(key, weight) for key, weight in source.weights.items()}
    weights = fit(source, lambda: MaskGITVQGAN(config), public, learned(book))
    return Part("maskgit", config, weights, () if size else (NO_SIZE,))


def _tokenizer_config(source: Source, flax: bool, book: Tensor, side: int) -> MaskGITVQGANConfig:
    """Infers the configuration. Pooling has no weights, so levels are not visible in the names.

    Flax numbers the residual blocks of the encoder through all levels, and as many as one level has follow at the end.
    Each decoder level but the last ends with a convolution of its own.
    """
    if flax:
        blocks = count(source, lambda i: f"encoder/ResBlock_{i}/GroupNorm_0/scale")
        levels = count(source, lambda i: f"decoder/Conv_{i}/kernel") - 1  # the first, the last, and one between levels
        if levels < 1 or blocks % (levels + 1):
            raise ArtifactError(f"the levels of {source.path} differ in their number of residual blocks", found=blocks)
        each = blocks // (levels + 1)
        widths = [shape(source, f"encoder/ResBlock_{i * each}/Conv_0/kernel")[3] for i in range(levels)]
        channels = shape(source, "encoder/Conv_0/kernel")[3]
    else:
        levels = count(source, lambda i: f"encoder.down.{i}.block.0.conv1.weight")
        each = count(source, lambda j: f"encoder.mid.{j}.conv1.weight")
        widths = [shape(source, f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
        channels = shape(source, "encoder.conv_in.weight")[0]
    if any(width % channels for width in widths):
        raise ArtifactError(f"the widths of {source.path} are not multiples of {channels}", found=widths)
    multipliers = tuple(width // channels for width in widths)
    return MaskGITVQGANConfig(side, channels, multipliers, each, len(book), book.shape[1])


def _flax_name(ours: str, levels: int, blocks: int) -> str:
    """The flax name of one of ours: residual blocks and convolutions are numbered in call order."""
    part, _, rest = ours.partition(".")

    def block(number: int, inner: str) -> str:
        layer, kind = inner.split(".")
        names = {"norm1": "GroupNorm_0", "norm2": "GroupNorm_1", "conv1": "Conv_0", "conv2": "Conv_1"}
        name = names.get(layer, "Conv_2")
        return f"{part}/ResBlock_{number}/{name}/{_flax_kind(name, kind)}"

    if match := re.fullmatch(r"(down|up)\.(\d+)\.block\.(\d+)\.(.+)", rest):
        level, index = int(match[2]), int(match[3])
        order = level if match[1] == "down" else levels - level  # the decoder begins with its middle blocks
        return block(order * blocks + index, match[4])
    if match := re.fullmatch(r"mid\.(\d+)\.(.+)", rest):
        return block(int(match[1]) + (levels * blocks if part == "encoder" else 0), match[2])
    layer, _, kind = rest.rpartition(".")
    if match := re.fullmatch(r"up\.(\d+)\.upsample_conv", layer):
        return f"decoder/Conv_{levels - int(match[1])}/{_flax_kind('Conv', kind)}"
    last = 1 if part == "encoder" else levels
    name = {"conv_in": "Conv_0", "conv_out": f"Conv_{last}", "norm_out": "GroupNorm_0"}.get(layer, layer)
    return f"{part}/{name}/{_flax_kind(name, kind)}"


def _flax_kind(layer: str, kind: str) -> str:
    return kind if kind == "bias" else "scale" if layer.startswith("GroupNorm") else "kernel"


def _kernel(key: str, weight: Tensor) -> Tensor:
    return weight.permute(3, 2, 0, 1) if key.endswith("/kernel") and weight.ndim == 4 else weight


def prior(sources: list[Source], tokenizer: Part) -> Part:
    """The transformer. Its vocabulary is the codes, the classes, and the mask.

    Raises:
        ArtifactError: It does not fit the tokenizer, or a weight is missing, left over or of the wrong shape.
    """
    (source,) = sources
    source.weights = {key.removeprefix("params/"): weight for key, weight in source.weights.items()}
    words, size = take(source, "Embed_0/word_embeddings/embedding"), tokenizer.config.codebook_size
    width, heads, _ = shape(source, "TransformerLayer_0/Attention_0/self_attention/query/kernel")
    positions = shape(source, "Embed_0/position_embeddings/embedding")[0] - 1
    side = square(source, positions)
    classes = len(words) - size - 1
    check(source, {"codes and a mask": True}, {"codes and a mask": classes > 0})
    config = MaskGITConfig(
        (side, side, 1),
        size,
        width,
        count(source, lambda i: f"TransformerLayer_{i}/Attention_0/attention_output_ln/scale"),
        heads,
        classes,
        network="bert",
        mlp_width=shape(source, "TransformerLayer_0/Mlp_0/intermediate_output/kernel")[1],
    )
    bias = take(source, "MlmLayer_0/mlm_bias/bias")
    given: Weights = {
        "tok_emb.weight": _rows(words, size),
        "cls_emb.weight": words[size:-1],
        "bias": bias[:size],
    }
    source.weights = {key: _dense(key, weight) for key, weight in source.weights.items()}
    return Part("maskgit", config, fit(source, lambda: BertMaskGIT(config), _transformer_name, given))


def _rows(words: Tensor, size: int) -> Tensor:
    """The embedding rows of the codes and of the mask, the last of the vocabulary."""
    return torch.cat([words[:size], words[-1:]])


def _transformer_name(ours: str) -> str:
    name = ours
    for pattern, theirs in _TRANSFORMER:
        name = re.sub(pattern, theirs, name)
    if name.endswith("weight"):
        return name.removesuffix("weight") + ("scale" if "_ln/" in name else "kernel")
    return name


def _dense(key: str, weight: Tensor) -> Tensor:
    """A weight in our layout: linear layers [outputs, inputs], heads concatenated."""
    if key.endswith("/out/kernel"):
        return weight.flatten(0, 1).T
    if re.search(r"/(query|key|value)/(kernel|bias)$", key):
        weight = weight.flatten(-2)
    if key.endswith("/kernel"):
        return weight.T
    return weight[None] if key.endswith("position_embeddings/embedding") else weight
