"""thuanz123/enhancing-transformers: ViT-VQGAN and its GPT."""

import re

from vqdeploy.convert.containers import Source
from vqdeploy.convert.parts import Part, check, count, fit, learned, need, section, shape, square, submodel, take, whole
from vqdeploy.errors import ArtifactError
from vqdeploy.models.gpt import GPT, GPTConfig
from vqdeploy.models.vitvqgan import HEAD_DIM, ViTConfig, ViTVQGAN, ViTVQGANConfig

TOKENIZER = r"(stage1_model\.)?encoder\.to_patch_embedding\.0\.weight"
PRIOR = r"(transformer\.)?(tok_emb_code\.weight|blocks\.0\.attn\.time_mix)"


def tokenizer(source: Source) -> Part:
    """A ViT-VQGAN, from a file of its own or as first stage of a larger one.

    Raises:
        ArtifactError: It quantizes residually, a weight is missing, left over or of the wrong shape, or the
            configuration contradicts the weights.
    """
    if any(key.startswith("stage1_model.") for key in source.weights):
        source = submodel(source, "stage1_model.", "stage1")
    declared = section(source.config, "image_size", "patch_size")
    side = square(source, shape(source, "encoder.en_pos_embedding")[1])
    patch = shape(source, "encoder.to_patch_embedding.0.weight")[2]
    if section(source.config, "use_residual").get("use_residual"):
        raise ArtifactError(f"{source.path} quantizes residually, which is not supported")
    codes, dim = shape(source, "quantizer.embedding.weight")
    quantizer = section(source.config, "n_embed", "embed_dim")
    check(
        source,
        {
            "image_size": whole(declared, "image_size"),
            "patch_size": whole(declared, "patch_size"),
            "n_embed": whole(quantizer, "n_embed"),
            "embed_dim": whole(quantizer, "embed_dim"),
        },
        {"image_size": side * patch, "patch_size": patch, "n_embed": codes, "embed_dim": dim},
    )
    config = ViTVQGANConfig(side * patch, patch, _vit(source, "encoder"), _vit(source, "decoder"), codes, dim)
    given = learned(take(source, "quantizer.embedding.weight"))
    weights = fit(source, lambda: ViTVQGAN(config), lambda ours: ours, given, r"^loss\.")
    return Part("vitvqgan", config, weights)


def _vit(source: Source, name: str) -> ViTConfig:
    layers = count(source, lambda i: f"{name}.transformer.layers.{i}.0.norm.weight")
    if not layers:
        raise ArtifactError(f"{source.path} lacks {name}.transformer.layers.0.0.norm.weight")
    projection = shape(source, f"{name}.transformer.layers.0.0.fn.to_qkv.weight")
    mlp = shape(source, f"{name}.transformer.layers.0.1.fn.net.0.weight")[0]
    return ViTConfig(projection[1], layers, projection[0] // 3 // HEAD_DIM, mlp)


def prior(sources: list[Source], tokenizer: Part) -> Part:
    """The GPT. Its condition has an embedding of its own, without a row for no label.

    Raises:
        VqdeployError: The configuration does not give the number of heads.
        ArtifactError: It has a condition of several tokens, a weight is missing, left over or of the wrong shape, or it
            does not fit the tokenizer.
    """
    (source,) = sources
    if any(key.startswith("transformer.") for key in source.weights):
        source = submodel(source, "transformer.", "transformer")
    declared = section(source.config, "n_heads")
    grid, size = tokenizer.config.grid, tokenizer.config.codebook_size
    if (length := shape(source, "pos_emb_cond")[1]) != 1:
        raise ArtifactError(f"the condition of the prior in {source.path} is too long", expected=1, found=length)
    classes, width = shape(source, "tok_emb_cond.weight")
    check(
        source,
        {"codes of the tokenizer": size, "positions of the tokenizer": grid[0] * grid[1]},
        {
            "codes of the tokenizer": shape(source, "tok_emb_code.weight")[0],
            "positions of the tokenizer": shape(source, "pos_emb_code")[1],
        },
    )
    config = GPTConfig(
        grid,
        size,
        width,
        count(source, lambda i: f"blocks.{i}.ln1.weight"),
        need(whole(declared, "n_heads"), "n_heads", source, "--prior-config"),
        classes,
        token_shift=True,
        squared_relu=True,
        null_label=False,
    )
    return Part("vitvqgan", config, fit(source, lambda: GPT(config), _gpt_name, ignored=r"\.attn\.mask$"))


def _gpt_name(ours: str) -> str:
    name = ours.replace("transformer.blocks.", "blocks.")
    return re.sub(r"\.mlp\.(\d)\.", lambda match: f".mlp.p{int(match[1]) // 2}.", name)
