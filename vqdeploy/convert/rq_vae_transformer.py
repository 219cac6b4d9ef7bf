"""kakaobrain/rq-vae-transformer: RQ-VAE and RQ-Transformer, each a folder of `model.pt` and `config.yaml`."""

from typing import Any

import torch

from vqdeploy.convert.containers import Source
from vqdeploy.convert.conv import NO_SIZE, check_ddconfig, read_conv
from vqdeploy.convert.parts import Part, check, count, fit, need, section, shape, whole
from vqdeploy.errors import ArtifactError
from vqdeploy.models.rqtransformer import RQTransformer, RQTransformerConfig
from vqdeploy.models.rqvae import RQVAE, RQVAEConfig

TOKENIZER = r"quantizer\.codebooks\.0\.weight"
PRIOR = r"(body_transformer|head_transformer)\.blocks\.0\.ln1\.weight"

_CODEBOOK = "quantizer.codebooks.0."


def tokenizer(source: Source) -> Part:
    """An RQ-VAE with one shared codebook, which the file stores once per depth.

    Raises:
        ArtifactError: The codebooks differ by depth, positions are folded into one, a weight is missing, left over or
            of the wrong shape, or the configuration contradicts the weights.
    """
    ddconfig = section(section(source.config, "ddconfig").get("ddconfig"))
    declared = section(source.config, "code_shape")
    depth = count(source, lambda d: f"quantizer.codebooks.{d}.weight")
    books = [source.weights.pop(f"quantizer.codebooks.{d}.weight") for d in range(depth)]
    if any(book.shape != books[0].shape or not torch.equal(book, books[0]) for book in books):
        raise ArtifactError(f"the depths of {source.path} have codebooks of their own, which is not supported")
    latent, code = declared.get("latent_shape"), declared.get("code_shape")
    if isinstance(latent, list) and isinstance(code, list) and latent[:2] != code[:2]:
        raise ArtifactError(f"{source.path} folds positions of the map into one, which is not supported", found=code)
    size = whole(ddconfig, "resolution")
    source.weights["quantizer"] = books[0]  # marks the file as having a codebook
    conv = read_conv(source, lambda ours: ours, size)
    del source.weights["quantizer"]
    check_ddconfig(source, ddconfig, conv)
    codes, dim = len(books[0]) - 1, books[0].shape[1]  # the last row is padding
    check(
        source,
        {
            "n_embed": whole(declared, "n_embed"),
            "embed_dim": whole(declared, "embed_dim"),
            "code_shape": code[-1] if isinstance(code, list) and code else None,
        },
        {"n_embed": codes, "embed_dim": dim, "code_shape": depth},
    )
    config = RQVAEConfig(conv, codes, dim, depth)
    given = {"quantizer.codebook": books[0][:-1]}
    for name, without in (("embed_ema", books[0][:-1]), ("cluster_size_ema", torch.ones(codes))):
        given[f"quantizer.{name}"] = source.weights.get(_CODEBOOK + name, without)
    weights = fit(source, lambda: RQVAE(config), lambda ours: ours, given, r"^quantizer\.codebooks\.\d+\.\w+_ema$")
    return Part("rqvae", config, weights, () if size else (NO_SIZE,))


def prior(sources: list[Source], tokenizer: Part) -> Part:
    """An RQ-Transformer. It embeds codes by the codebook of the tokenizer, which its file does not have.

    Raises:
        VqdeployError: Neither the configuration nor the width gives the number of heads.
        ArtifactError: It does not fit the tokenizer, a weight is missing, left over or of the wrong shape, or the
            configuration contradicts the weights.
    """
    (source,) = sources
    declared = section(source.config, "vocab_size", "block_size")
    body = section(section(declared, "body").get("body"), "block").get("block")
    width = shape(source, "pos_emb_cond")[2]
    heads = whole(section(body, "n_head"), "n_head")
    if heads is None and width % 64 == 0:
        heads = width // 64  # of every published model
    grid, codes, dim = tokenizer.config.grid, tokenizer.config.codebook_size, tokenizer.config.code_dim
    vocabulary = shape(source, "classifier.linear.weight")[0]
    block = declared.get("block_size")
    check(
        source,
        {"block_size": list(block) if isinstance(block, list | tuple) else None},
        {"block_size": list(grid)},
    )
    check(
        source,
        {"n_embed of the tokenizer": codes, "positions of the tokenizer": grid[0] * grid[1], "embed_dim": dim},
        {
            "n_embed of the tokenizer": vocabulary,
            "positions of the tokenizer": shape(source, "pos_emb_hw")[1],
            "embed_dim": shape(source, "input_mlp.weight")[1],
        },
    )
    config = RQTransformerConfig(
        grid,
        codes,
        dim,
        width,
        count(source, lambda i: f"body_transformer.blocks.{i}.ln1.weight"),
        count(source, lambda i: f"head_transformer.blocks.{i}.ln1.weight"),
        need(heads, "n_head", source, "--prior-config"),
        shape(source, "cond_emb.weight")[0],
        shape(source, "pos_emb_cond")[1],
    )
    weights = fit(source, lambda: RQTransformer(config, torch.empty(codes, dim)), lambda ours: ours)
    return Part("rqvae", config, weights, sampling=_sampling(source, codes))


def _sampling(source: Source, codes: int) -> dict[str, Any]:
    """Sampling options of the publishers, if the configuration has them."""
    given = section(source.config, "top_k", "top_p")
    options: dict[str, Any] = {}
    for key, ours in (("temp", "temperature"), ("top_p", "top_p")):
        if isinstance(given.get(key), int | float):
            options[ours] = float(given[key])
    if isinstance(given.get("top_k"), int):
        options["top_k"] = given["top_k"] if given["top_k"] < codes else 0
    return options
