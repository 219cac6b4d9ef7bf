"""Folders of Hugging Face diffusers with a `VQModel`: Kandinsky 2, latent diffusion, aMUSEd, Meissonic."""

import re
from collections.abc import Mapping
from typing import Any

from vqdeploy.convert.containers import Source
from vqdeploy.convert.conv import read_conv
from vqdeploy.convert.parts import Part, check, fit, learned, shape, take, whole
from vqdeploy.errors import ArtifactError
from vqdeploy.models.movq import MoVQ, MoVQConfig

TOKENIZER = r"encoder\.down_blocks\.0\.resnets\.0\.conv1\.weight"

_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of old files
_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D")
_OURS = (
    (r"^(\w+)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"^(\w+)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"^(\w+)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
    (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"nin_shortcut", "conv_shortcut"),
    (r"norm_out", "conv_norm_out"),
    (r"(attentions\.\d+)\.q\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.k\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.v\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"(attentions\.\d+)\.norm\.(norm_layer|conv_[yb])\.", r"\1.spatial_norm.\2."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
)


def tokenizer(source: Source) -> Part:
    """A `VQModel`. Fields missing from `config.json` have the defaults of its constructor.

    Raises:
        ArtifactError: Blocks, activation or norms are not supported, a weight is missing, left over or of the wrong
            shape, or the configuration contradicts the weights.
    """
    declared: Mapping[str, Any] = source.config if isinstance(source.config, dict) else {}
    _check_kinds(source, declared)
    source.weights = {_modern(key): weight for key, weight in source.weights.items()}
    modulation = "decoder.conv_norm_out.conv_y.weight" in source.weights
    levels = sum(
        bool(re.fullmatch(r"encoder\.down_blocks\.\d+\.resnets\.0\.conv1\.weight", key)) for key in source.weights
    )

    def public(ours: str) -> str:
        deepest_first = re.sub(
            r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", ours
        )
        for pattern, theirs in _OURS:
            deepest_first = re.sub(pattern, theirs, deepest_first)
        return deepest_first

    conv = read_conv(source, public, None)
    codes, dim = shape(source, "quantize.embedding.weight")
    widths = declared.get("block_out_channels")
    check(
        source,
        {
            "num_vq_embeddings": whole(declared, "num_vq_embeddings"),
            "vq_embed_dim": whole(declared, "vq_embed_dim"),
            "latent_channels": whole(declared, "latent_channels"),
            "layers_per_block": whole(declared, "layers_per_block"),
            "block_out_channels": list(widths) if isinstance(widths, list | tuple) else None,
            "norm_type": declared.get("norm_type"),
        },
        {
            "num_vq_embeddings": codes,
            "vq_embed_dim": dim,
            "latent_channels": conv.latent_channels,
            "layers_per_block": conv.res_blocks,
            "block_out_channels": list(conv.widths),
            "norm_type": "spatial" if modulation else "group",
        },
    )
    # Pipelines of models with `lookup_from_codebook` (aMUSEd, Meissonic) have pixels in [0, 1].
    pixels = (0.0, 1.0) if declared.get("lookup_from_codebook") else (-1.0, 1.0)
    config = MoVQConfig(conv, codes, dim, groups=1, modulation=modulation, pixel_range=pixels)
    given = learned(take(source, "quantize.embedding.weight"))
    weights = fit(source, lambda: MoVQ(config), public, given)
    notes = [f"pixels inside the model are in [{pixels[0]:g}, {pixels[1]:g}]"]
    if not declared:
        notes.append("there is no config.json: if the model has lookup_from_codebook, pixels are in [0, 1]")
    return Part("movq" if modulation else "vqgan", config, weights, tuple(notes))


def _check_kinds(source: Source, declared: Mapping[str, Any]) -> None:
    """Rejects configurations that our layers do not support."""
    kind = declared.get("_class_name", "VQModel")
    if kind not in ("VQModel", "VQDiffusionVQModel"):
        raise ArtifactError(
            f"{source.path} is of diffusers' {kind}, which is not a VQ model", expected="VQModel", found=kind
        )
    blocks = [*declared.get("down_block_types", ()), *declared.get("up_block_types", ())]
    if odd := [block for block in blocks if block not in _BLOCKS]:
        raise ArtifactError(f"blocks in {source.path} are not supported", expected=" or ".join(_BLOCKS), found=odd[0])
    if declared.get("act_fn", "silu") != "silu":
        raise ArtifactError(
            f"the activation in {source.path} is not supported", expected="silu", found=declared["act_fn"]
        )
    if whole(declared, "norm_num_groups") not in (None, 32):
        raise ArtifactError(
            f"norm_num_groups in {source.path} is not supported", expected=32, found=declared["norm_num_groups"]
        )


def _modern(key: str) -> str:
    """Renames attention weights of old files."""
    return re.sub(
        r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda match: f"{match[1]}.{_ATTENTION[match[2]]}.", key
    )
