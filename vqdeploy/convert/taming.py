"""CompVis/taming-transformers: VQGAN, Gumbel VQGAN, and Net2Net with its GPT; also the VQ models of latent diffusion.

A Lightning checkpoint has one model, or a whole Net2Net: `transformer.*`, `first_stage_model.*` and, for conditions
that are images, `cond_stage_model.*`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from vqdeploy.convert.containers import Source
from vqdeploy.convert.conv import NO_SIZE, averaged, check_ddconfig, read_conv
from vqdeploy.convert.parts import Part, check, count, fit, learned, need, section, shape, submodel, take, whole
from vqdeploy.errors import ArtifactError
from vqdeploy.models.gpt import GPT, GPTConfig
from vqdeploy.models.movq import MoVQ, MoVQConfig

TOKENIZER = r"(first_stage_model\.)?encoder\.down\.0\.block\.0\.norm1\.weight"
PRIOR = r"transformer\.(blocks\.0\.attn\.key|tok_emb|ln_f)\.weight"

_LEFT_OVER = r"^loss\.|^colorize$|^(model_)?ema[._]|^scale_factor$|^quantize\.used$|num_batches_tracked$"


def tokenizer(source: Source) -> Part:
    """A VQGAN, from a file of its own or as first stage of a larger one.

    Raises:
        ArtifactError: Its codes are remapped, only some weights have an average, a weight is missing, left over or of
            the wrong shape, or the configuration contradicts the weights.
    """
    if any(key.startswith("first_stage_model.") for key in source.weights):
        source = submodel(source, "first_stage_model.", "first_stage_config")
    declared = section(source.config, "ddconfig")
    ddconfig = section(declared.get("ddconfig"))
    if declared.get("remap") or "quantize.used" in source.weights:
        raise ArtifactError(f"{source.path} numbers its codes by a `remap` file, which is not supported")
    source, notes = averaged(source, lambda key: "model_ema." + key.replace(".", ""))
    gumbel = "quantize.proj.weight" in source.weights
    return convolutional(source, "vqgan", declared, ddconfig, notes, gumbel=gumbel)


def convolutional(
    source: Source,
    model: str,
    declared: Mapping[str, Any],
    ddconfig: Mapping[str, Any],
    notes: tuple[str, ...] = (),
    modulation: bool = False,
    gumbel: bool = False,
) -> Part:
    """A tokenizer with the layers and names of taming-transformers, for all code bases that share them.

    Args:
        source: The weights.
        model: Name of its system.
        declared: `n_embed` and `embed_dim` of the configuration, None if missing.
        ddconfig: Configuration section of encoder and decoder.
        notes: Messages for the user.
        modulation: Whether the norms of the decoder are modulated.
        gumbel: Whether a linear layer scores the codes.

    Raises:
        ArtifactError: A weight is missing, left over or of the wrong shape, or the configuration contradicts the
            weights.
    """
    public = _gumbel_name if gumbel else _name
    resolution = whole(ddconfig, "resolution")
    conv = read_conv(source, public, resolution)
    check_ddconfig(source, ddconfig, conv)
    codes, dim = shape(source, public("quantizer.codebook"))
    check(
        source,
        {"n_embed": whole(declared, "n_embed"), "embed_dim": whole(declared, "embed_dim")},
        {"n_embed": codes, "embed_dim": dim},
    )
    config = MoVQConfig(conv, codes, dim, groups=1, modulation=modulation, gumbel=gumbel)
    given = {} if gumbel else learned(take(source, public("quantizer.codebook")))
    weights = fit(source, lambda: MoVQ(config), public, given, _LEFT_OVER)
    return Part(model, config, weights, notes if resolution else (*notes, NO_SIZE))


def _name(ours: str) -> str:
    return "quantize.embedding.weight" if ours == "quantizer.codebook" else ours


def _gumbel_name(ours: str) -> str:
    return "quantize.embed.weight" if ours == "quantizer.codebook" else ours.replace("quantizer.", "quantize.")


def prior(sources: list[Source], tokenizer: Part) -> Part:
    """The GPT of a Net2Net.

    Conditions and codes share one embedding table there, without an offset; here each has its own table.

    Raises:
        VqdeployError: The configuration does not give the number of heads or of classes.
        ArtifactError: It does not fit the tokenizer, is conditioned on images or has another start token than 0, a
            weight is missing, left over or of the wrong shape, or the configuration contradicts the weights.
    """
    (source,) = sources
    source = submodel(source, "transformer.", "transformer_config")
    conv, codes = tokenizer.config.conv, tokenizer.config.codebook_size
    declared = section(section(source.config, "params").get("params") or source.config, "n_head")
    vocabulary, width = shape(source, "tok_emb.weight")
    layers = count(source, lambda i: f"blocks.{i}.attn.key.weight")
    check(
        source,
        {
            "vocab_size": whole(declared, "vocab_size"),
            "n_embd": whole(declared, "n_embd"),
            "n_layer": whole(declared, "n_layer"),
        },
        {"vocab_size": vocabulary, "n_embd": width, "n_layer": layers},
    )
    classes = _classes(sources[0])
    if classes > vocabulary or codes > vocabulary:
        raise ArtifactError(
            f"the vocabulary in {source.path} is too small", expected=max(classes, codes), found=vocabulary
        )
    heads = need(whole(declared, "n_head"), "n_head", source, "--prior-config")
    grid = (conv.grid, conv.grid, 1)
    config = GPTConfig(grid, codes, width, layers, heads, classes, null_label=False)
    tokens, positions = source.weights["tok_emb.weight"], source.weights["pos_emb"]
    if positions.shape[1] < config.positions:
        raise ArtifactError(
            f"the GPT in {source.path} is for fewer codes than {conv.resolution} pixels have",
            expected=config.positions,
            found=positions.shape[1],
        )
    given = {
        "tok_emb_cond.weight": tokens[:classes],
        "tok_emb_code.weight": tokens[:codes],
        "pos_emb_cond": positions[:, :1],
        # Code t has entry t + 1; the last code is never an input.
        "pos_emb_code": torch.cat([positions[:, 1 : config.positions], torch.zeros_like(positions[:, :1])], 1),
        "head.weight": source.weights["head.weight"][:codes],
    }
    weights = fit(source, lambda: GPT(config), _gpt_name, given, r"\.attn\.mask$|^(tok_emb|head)\.weight$|^pos_emb$")
    return Part("vqgan", config, weights)


def _gpt_name(ours: str) -> str:
    return ours.replace("transformer.blocks.", "blocks.").replace("layer_norm.", "ln_f.")


def _classes(source: Source) -> int:
    """Number of labels; 1 for an unconditional prior, whose only label is token 0."""
    if any(key.startswith("cond_stage_model.") for key in source.weights):
        raise ArtifactError(f"the prior in {source.path} is conditioned on images, which is not supported")
    condition = section(source.config, "cond_stage_config").get("cond_stage_config")
    target = str(condition.get("target", "")) if isinstance(condition, dict) else ""
    if target.endswith("SOSProvider"):
        if whole(section(condition, "sos_token"), "sos_token"):
            raise ArtifactError(f"the start token of the prior in {source.path} is not 0, which is not supported")
        return 1
    classes = whole(section(condition, "n_classes"), "n_classes")
    if classes is None and isinstance(source.config, dict):
        classes = whole(source.config, "n_classes")
    return need(classes, "n_classes", source, "--prior-config")
