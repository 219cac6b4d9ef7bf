"""BAAI's Emu3-VisionTokenizer, a folder of `config.json` and safetensors; see `vqdeploy.models.emu3`."""

import re

import torch
from torch import Tensor

from vqdeploy.convert.containers import Source, Weights
from vqdeploy.convert.conv import NO_SIZE, check_ddconfig, read_conv
from vqdeploy.convert.parts import Part, check, count, fit, learned, section, shape, take, whole
from vqdeploy.models.emu3 import Emu3, Emu3Config

TOKENIZER = r"encoder\.time_conv\.0\.conv\.conv\.weight"

_EPSILON = 1e-5  # of BatchNorm3d
_TEMPORAL = r"^(encoder|decoder)\.time_|^(post_)?quant_conv\."


def tokenizer(source: Source) -> Part:
    """The tokenizer for one image.

    Raises:
        ArtifactError: A weight is missing, left over or of the wrong shape, or the configuration contradicts the
            weights.
    """
    declared = section(source.config, "codebook_size", "ch_mult")
    conv = read_conv(source, lambda ours: ours, None)
    levels = [conv.resolution >> level for level in declared.get("attn_resolutions", ())]  # level indices there
    check_ddconfig(source, {**declared, "attn_resolutions": levels} if declared else {}, conv)
    codes, dim = shape(source, "quantize.embedding.weight")
    halvings = count(source, lambda i: f"encoder.time_conv.{i}.conv.conv.weight")
    check(
        source,
        {
            "codebook_size": whole(declared, "codebook_size"),
            "embed_dim": whole(declared, "embed_dim"),
            "temporal_downsample_factor": whole(declared, "temporal_downsample_factor"),
        },
        {"codebook_size": codes, "embed_dim": dim, "temporal_downsample_factor": 1 << halvings},
    )
    blocks = count(source, lambda i: f"encoder.time_res_stack.{i}.conv1.conv.weight")
    config = Emu3Config(conv, codes, dim, 1 << halvings, blocks)
    given = learned(take(source, "quantize.embedding.weight")) | _folded(source, halvings)
    weights = fit(source, lambda: Emu3(config), lambda ours: ours, given, _TEMPORAL)
    return Part("emu3", config, weights, (NO_SIZE,))


def _folded(source: Source, halvings: int) -> Weights:
    """Folds the temporal layers for a single image."""
    folded = {}
    for key, weight in source.weights.items():
        name = re.sub(r"^(encoder|decoder)\.time", r"temporal_\1.time", key)
        name = re.sub(r"(\.conv)+\.(weight|bias)$", r".\2", name)
        if name.startswith("temporal_encoder.time_conv"):
            index = int(name.split(".")[2])
            inputs, outputs = 1 if index == 0 else 1 << (halvings - index), 1 << (halvings - index - 1)
            folded[name] = weight.repeat(outputs) if name.endswith("bias") else _halved(weight, inputs, outputs)
        elif ".norm" in name and name.startswith("temporal"):
            folded |= _normed(source.weights, key, name)
        elif re.match(_TEMPORAL, key):
            folded[name] = weight[:, :, -1] if weight.ndim == 5 else weight
    return folded


def _halved(weight: Tensor, inputs: int, outputs: int) -> Tensor:
    """A temporal convolution (4 taps, stride 2, two zeros before) as a 2-d one, with frames as channels.

    Args:
        weight: [C, C, 4, 3, 3].
        inputs: Number of distinct frames; 1 for a still clip.
        outputs: Number of output frames.

    Returns:
        [outputs * C, inputs * C, 3, 3].
    """
    channels = weight.shape[0]
    plane = weight.new_zeros(outputs, channels, inputs, channels, *weight.shape[3:])
    for out in range(outputs):
        for tap in range(4):
            if (frame := 2 * out - 2 + tap) >= 0:
                plane[out, :, min(frame, inputs - 1)] += weight[:, :, tap]
    return plane.flatten(0, 1).flatten(1, 2)


def _normed(weights: Weights, key: str, name: str) -> Weights:
    """Batch normalization in inference as scale and shift."""
    layer, ours = key.rpartition(".")[0], name.rpartition(".")[0]
    scale = weights[f"{layer}.weight"] * torch.rsqrt(weights[f"{layer}.running_var"] + _EPSILON)
    shift = weights[f"{layer}.bias"] - weights[f"{layer}.running_mean"] * scale
    return {f"{ours}.weight": scale, f"{ours}.bias": shift}
