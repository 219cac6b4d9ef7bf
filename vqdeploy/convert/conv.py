"""Infers the configuration of a VQGAN-like tokenizer from its weights, for all code bases that share it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vqdeploy.convert.containers import Source
from vqdeploy.convert.parts import check, count, shape, whole
from vqdeploy.errors import ArtifactError
from vqdeploy.models.conv import ConvConfig

DEFAULT_RESOLUTION = 256
NO_SIZE = "the weights do not give the image size: 256 is assumed; set another with `vqdeploy export --image-size`"


def read_conv(source: Source, public: Callable[[str], str], resolution: int | None) -> ConvConfig:
    """The configuration of the encoder and the decoder.

    Args:
        source: The weights.
        public: Maps our names to public names; only names of the encoder are looked up.
        resolution: Side of the images in pixels; 256 if None.

    Raises:
        ArtifactError: There is no codebook, a weight is missing, or the shapes are not those of such an encoder.
    """

    def width(name: str) -> int:
        return shape(source, public(name))[0]

    refuse_what_has_no_codes(source)
    levels = count(source, lambda i: public(f"encoder.down.{i}.block.0.conv1.weight"))
    channels, inputs = width("encoder.conv_in.weight"), shape(source, public("encoder.conv_in.weight"))[1]
    if inputs != 3:
        raise ArtifactError(f"the tokenizer in {source.path} takes no images", expected="3 channels", found=inputs)
    widths = [width(f"encoder.down.{i}.block.0.conv1.weight") for i in range(levels)]
    if not widths or any(w % channels for w in widths):
        raise ArtifactError(f"the widths of the encoder in {source.path} are not multiples of {channels}", found=widths)
    attention = [i for i in range(levels) if public(f"encoder.down.{i}.attn.0.q.weight") in source.weights]
    side = resolution or DEFAULT_RESOLUTION
    if side % (1 << (levels - 1)):
        raise ArtifactError(f"resolution {side} cannot be halved {levels - 1} times")
    return ConvConfig(
        side,
        channels,
        tuple(w // channels for w in widths),
        count(source, lambda j: public(f"encoder.down.0.block.{j}.conv1.weight")),
        tuple(side >> level for level in attention),
        width("encoder.conv_out.weight"),
        middle_attention=public("encoder.mid.attn_1.q.weight") in source.weights,
    )


def check_ddconfig(source: Source, ddconfig: Mapping[str, Any], conv: ConvConfig) -> None:
    """Rejects a configuration that contradicts the weights, in the terms of taming-transformers.

    Raises:
        ArtifactError: A field is malformed or differs.
    """

    def numbers(key: str) -> list[int] | None:
        values = ddconfig.get(key)
        return None if not isinstance(values, list | tuple) else [whole({key: value}, key) or 0 for value in values]

    attention = numbers("attn_resolutions")
    reachable = {conv.resolution >> level for level in range(len(conv.channel_multipliers))}
    declared = {
        "ch": whole(ddconfig, "ch"),
        "ch_mult": numbers("ch_mult"),
        "num_res_blocks": whole(ddconfig, "num_res_blocks"),
        "attn_resolutions": None if attention is None else sorted(set(attention) & reachable),
        "z_channels": whole(ddconfig, "z_channels"),
    }
    found = {
        "ch": conv.channels,
        "ch_mult": list(conv.channel_multipliers),
        "num_res_blocks": conv.res_blocks,
        "attn_resolutions": sorted(conv.attention_resolutions),
        "z_channels": conv.latent_channels,
    }
    check(source, declared, found)


def averaged(source: Source, shadow: Callable[[str], str]) -> tuple[Source, tuple[str, ...]]:
    """Replaces weights by the moving averages of `LitEma`, and adds a note.

    `LitEma` has a buffer for each parameter, named like it without dots. This is not invertible, so the mapping starts
    from the names of the parameters.

    Args:
        source: The weights, with or without averages.
        shadow: Maps the name of a weight to that of its average.

    Raises:
        ArtifactError: Only some weights have an average.
    """
    own = [key for key in source.weights if re.match(r"(encoder|decoder|quantize|quant_conv|post_quant_conv)\.", key)]
    shadows = {key: shadow(key) for key in own}
    there = {key: source.weights[name] for key, name in shadows.items() if name in source.weights}
    weights = {key: w for key, w in source.weights.items() if not re.match(r"(model_ema|ema_\w+)\.", key)}
    if source.raw or not there:
        return replace(source, weights=weights), ()
    if lost := [key for key in own if key not in there]:
        raise ArtifactError(f"{source.path} has moving averages of some weights, and not of {lost[0]}", fix="add --raw")
    return replace(source, weights=weights | there), ("moving averages are taken; --raw takes the weights themselves",)


def refuse_what_has_no_codes(source: Source) -> None:
    """Rejects autoencoders without a codebook, which look like VQ models.

    Raises:
        ArtifactError: The file has no codebook.
    """
    keys = source.weights
    if any("quantize" in key or "codebook" in key for key in keys):
        return
    if any("conv_y" in key for key in keys):
        raise ArtifactError(f"{source.path} is a MoVQ without a codebook, as in Kandinsky 3, and makes no codes")
    if any(key.endswith(("quant_conv.weight", "encoder.conv_out.weight")) for key in keys):
        raise ArtifactError(f"{source.path} is an autoencoder without a codebook (a KL autoencoder) and makes no codes")
    raise ArtifactError(f"{source.path} holds no codebook")
