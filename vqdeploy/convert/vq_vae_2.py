"""rosinality/vq-vae-2-pytorch: VQ-VAE-2, and a PixelSNAIL for each of its two levels."""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vqdeploy.convert.containers import Source
from vqdeploy.convert.conv import DEFAULT_RESOLUTION
from vqdeploy.convert.parts import Part, count, fit, section, shape, whole
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.models.pixelsnail import PixelSNAILConfig, VQVAE2Prior, VQVAE2PriorConfig, causal_offsets
from vqdeploy.models.vqvae2 import VQVAE2, VQVAE2Config

State = Mapping[str, Tensor]

TOKENIZER = r"enc_b\.blocks\.0\.weight"
PRIOR = r"(horizontal|vertical)\.conv\."

_NO_SIZE = (
    "the weights do not give the image size: 256 is assumed; set another with `resolution` in a --tokenizer-config"
)
_TOKENIZER = {
    "enc_t.blocks": "encoders.0",
    "enc_b.blocks": "encoders.1",
    "quantize_conv_t": "projections.0",
    "quantize_conv_b": "projections.1",
    "quantize_t": "quantizers.0",
    "quantize_b": "quantizers.1",
    "upsample_t": "upsamplers.0",
    "dec_t.blocks": "decoders.0",
    "dec.blocks": "decoders.1",
}
_CODEBOOK = {"embed": "codebook", "embed_avg": "embed_ema", "cluster_size": "cluster_size_ema"}
_PRIOR = (  # patterns of names without the wrappers called `conv`
    (r"cond_resnet\.blocks\.(\d+)", lambda match: f"above.blocks.{int(match[1]) - 1}"),
    (r"(blocks\.\d+)\.(key_resblock|query_resblock|causal_attention|out_resblock|out)\.", r"\1.exit.\2."),
    (r"^out\.\d+\.(weight|bias)", r"out.\1"),
    (r"^out\.(\d+)\.", r"out_blocks.\1."),
)
_CAUSAL = re.compile(r"blocks\.\d+\.resblocks\.\d+\.conv[12]")


def tokenizer(source: Source) -> Part:
    """The tokenizer, with two levels. Its file does not depend on the image size.

    Raises:
        ArtifactError: A weight is missing, left over or of the wrong shape, or `resolution` of the configuration is
            malformed.
    """
    side = whole(section(source.config, "resolution"), "resolution")
    dim, codes = shape(source, "quantize_t.embed")
    first = next((i for i in range(3, 9) if f"enc_b.blocks.{i}.conv.1.weight" in source.weights), 5)
    blocks = count(source, lambda i: f"enc_b.blocks.{first + i}.conv.1.weight")
    config = VQVAE2Config(
        side or DEFAULT_RESOLUTION,
        channels=shape(source, "enc_b.blocks.2.weight")[0],
        res_blocks=blocks,
        res_channels=shape(source, f"enc_b.blocks.{first}.conv.1.weight")[0] if blocks else 1,
        codebook_size=codes,
        code_dim=dim,
    )
    try:
        given = tokenizer_weights(source.weights)
    except ValueError as error:
        raise ArtifactError(f"{source.path} is not a tokenizer of vq-vae-2 ({error})") from error
    weights = fit(source, lambda: VQVAE2(config), lambda ours: ours, given, "")
    return Part("vqvae2", config, weights, () if side else (_NO_SIZE,))


def prior(sources: list[Source], tokenizer: Part) -> Part:
    """The networks of both levels, in any order.

    Raises:
        VqdeployError: There are not exactly two files.
        ArtifactError: A weight is missing, left over or of the wrong shape, or the maps are not those of the tokenizer.
    """
    if len(sources) != 2:
        raise VqdeployError("this prior has two levels", expected="--prior TOP --prior BOTTOM", found=len(sources))
    levels = sorted((_level(source) for source in sources), key=lambda level: level[0].grid)
    config = VQVAE2PriorConfig(tuple(level for level, _ in levels), tokenizer.config.codebook_size, classes=1)
    if config.level_grids != tokenizer.config.level_grids:
        raise ArtifactError(
            f"the maps of the priors are not those of images of {tokenizer.config.resolution} pixels",
            expected=tokenizer.config.level_grids,
            found=config.level_grids,
            fix="add --tokenizer-config FILE, a YAML that gives resolution",
        )
    given = {f"levels.{i}.{name}": weight for i, (_, ws) in enumerate(levels) for name, weight in ws.items()}
    return Part("vqvae2", config, fit(sources[0], lambda: VQVAE2Prior(config), lambda ours: ours, given, ""))


def _level(source: Source) -> tuple[PixelSNAILConfig, dict[str, Tensor]]:
    """One network; its configuration is inferred from the weights."""
    try:
        grid = tuple(source.weights["background"].shape[2:])
        weights = prior_weights(source.weights)
        conv = weights["blocks.0.resblocks.0.conv1.above.weight"]
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ArtifactError(f"{source.path} is not a prior of vq-vae-2 ({error})") from error

    def number(name: str) -> int:
        found = 0
        while any(key.startswith(name.format(found)) for key in weights):
            found += 1
        return found

    taps = weights.get("above.codes.weight")
    config = PixelSNAILConfig(
        grid,
        channels=weights["entry.codes.weight"].shape[2],
        kernel=conv.shape[3],
        blocks=number("blocks.{}."),
        res_blocks=number("blocks.0.resblocks.{}."),
        res_channels=conv.shape[0],
        attention="blocks.0.exit.causal_attention.query.weight" in weights,
        out_res_blocks=number("out_blocks.{}."),
        condition_channels=0 if taps is None else taps.shape[2],
        condition_kernel=3 if taps is None else math.isqrt(taps.shape[0]),
        condition_res_blocks=number("above.blocks.{}."),
    )
    return config, weights


def tokenizer_weights(state: State) -> dict[str, Tensor]:
    """The state_dict of a two-level `VQVAE2`. Public codebooks are stored as columns [D, K].

    Raises:
        ValueError: A name is not that of a weight of the public tokenizer.
    """
    weights = {}
    for key, weight in state.items():
        part = next((part for part in _TOKENIZER if re.match(rf"(module\.)?{re.escape(part)}\.", key)), None)
        if part is None:
            raise ValueError(f"{key} is not a weight of the public tokenizer")
        name = key.removeprefix("module.").removeprefix(part + ".")
        columns = name in ("embed", "embed_avg")
        weights[f"{_TOKENIZER[part]}.{_CODEBOOK.get(name, name)}"] = weight.T.contiguous() if columns else weight
    return weights


def prior_weights(state: State) -> dict[str, Tensor]:
    """The state_dict of a `PixelSNAIL` of one class.

    Raises:
        ValueError: There is no `background`, which every public state_dict has.
        KeyError: Another weight is missing.
    """
    public = fold(state)
    if "background" not in public:
        raise ValueError("this is not a state_dict of the public prior; its files have one under `model`")
    del public["background"]
    horizontal, vertical = public.pop("horizontal.weight"), public.pop("vertical.weight")
    weights = {
        "entry.codes.weight": _entry(horizontal, vertical),
        "entry.row_bias": public.pop("horizontal.bias")[:, None, None],
        "entry.column_bias": public.pop("vertical.bias")[:, None, None],
    }
    if "cond_resnet.blocks.0.weight" in public:
        weights["above.codes.weight"] = _tables(public.pop("cond_resnet.blocks.0.weight")).flatten(0, 1)
        weights["above.bias"] = public.pop("cond_resnet.blocks.0.bias")[:, None, None]
    for key, weight in public.items():
        module, _, name = key.rpartition(".")
        if not _CAUSAL.fullmatch(module):
            for pattern, ours in _PRIOR:
                key = re.sub(pattern, ours, key)
            weights[key] = weight
        elif name == "bias":
            weights[f"{module}.above.bias"] = weight
        else:
            weights[f"{module}.above.weight"] = weight[:, :, :-1].contiguous()
            weights[f"{module}.left.weight"] = weight[:, :, -1:, : weight.shape[3] // 2].contiguous()
    return weights


def fold(state: State) -> dict[str, Tensor]:
    """Folds weight normalization: g * v / |v|, the norm over all dimensions but the first.

    Supports old names (`weight_g`, `weight_v`) and those of parametrizations, and drops wrapper modules called `conv`.
    Masked taps of causal convolutions are zeroed before the norm: the public code zeroes them at each forward pass, and
    an optimizer step may have changed them before the file was written.
    """
    public = {key.removeprefix("module."): weight for key, weight in state.items()}
    for ours, theirs in (("weight_g", "original0"), ("weight_v", "original1")):
        public = {key.replace(f"parametrizations.weight.{theirs}", ours): weight for key, weight in public.items()}
    folded = {}
    for key, weight in public.items():
        name = ".".join(part for part in key.split(".") if part != "conv")
        if key.endswith("weight_v"):
            name = name.removesuffix("_v")
            direction = _without_forbidden_taps(weight) if _CAUSAL.match(name) else weight
            norm = direction.flatten(1).norm(dim=1).view(-1, *[1] * (direction.ndim - 1))
            weight = public[key.removesuffix("v") + "g"] * direction / norm
        if not key.endswith("weight_g"):
            folded[name] = weight
    return folded


def _without_forbidden_taps(weight: Tensor) -> Tensor:
    allowed = weight.clone()
    allowed[:, :, -1, weight.shape[3] // 2 :] = 0
    return allowed


def _tables(weight: Tensor) -> Tensor:
    """Weight of a convolution over one-hot codes [C, K, rows, columns] -> tables of its taps [rows, columns, K, C]."""
    return weight.permute(2, 3, 1, 0).contiguous()


def _entry(horizontal: Tensor, vertical: Tensor) -> Tensor:
    """Both convolutions of the first layer as one set of tables [taps, K, C], summed where taps coincide."""
    reach = horizontal.shape[2]
    square = horizontal.new_zeros(reach + 1, 2 * reach + 1, *horizontal.shape[1::-1])
    square[:-1] += _tables(horizontal)
    square[:, :reach] += _tables(vertical)
    return torch.stack([square[reach + row, reach + column] for row, column in causal_offsets(reach, reach)])
