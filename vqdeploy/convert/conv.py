"""The shape of a convolutional tokenizer, read off its weights, for all code bases that took VQGAN's."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vqdeploy.convert.containers import Source
from vqdeploy.convert.parts import check, count, shape, whole
from vqdeploy.errors import ArtifactError
from vqdeploy.models.conv import ConvConfig

DEFAULT_RESOLUTION = 256
NO_SIZE = "the size of images is not in the weights: 256 is taken; `vqdeploy export --image-size` takes another"


def read_conv(source: Source, public: Callable[[str], str], resolution: int | None) -> ConvConfig:
    """The configuration of the encoder and the decoder.

    Args:
        source: The weights.
        public: The public name of one of our names; only those of the encoder are asked for.
        resolution: Side of the images; 256 when None.
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
    """Refuses the configuration of another model, in taming's terms."""

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
    """The moving averages that `LitEma` kept in the place of the weights, and a note that they were taken.

    It keeps a buffer for each parameter, called by the parameter's name without its dots. Which dots were there is not
    to be told from that name, so the names of the weights themselves are asked for.

    Args:
        source: The weights, with averages or without.
        shadow: The name of the average of a weight.

    Raises:
        ArtifactError: Some weights have an average and some have none.
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
    """Names autoencoders that look like a VQ model and are none.

    Raises:
        ArtifactError: The file holds no codebook.
    """
    keys = source.weights
    if any("quantize" in key or "codebook" in key for key in keys):
        return
    if any("conv_y" in key for key in keys):
        raise ArtifactError(f"{source.path} is a MoVQ without a codebook, as Kandinsky 3 has it: it makes no codes")
    if any(key.endswith(("quant_conv.weight", "encoder.conv_out.weight")) for key in keys):
        raise ArtifactError(f"{source.path} is an autoencoder without a codebook (a KL autoencoder): it makes no codes")
    raise ArtifactError(f"{source.path} holds no codebook")
