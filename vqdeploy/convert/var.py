"""FoundationVision/VAR: the tokenizer and the transformers of 256 and 512 pixels.

A published file has one of them; a file of its training has both, `vae_local` and `var_wo_ddp`.
"""

import re
from dataclasses import replace

from vqdeploy.convert.containers import Source, Weights
from vqdeploy.convert.conv import read_conv
from vqdeploy.convert.parts import Part, check, count, fit, learned, section, shape, square, submodel, take
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.models.quantizers import MultiScaleQuantizer
from vqdeploy.models.var import VAR, VARConfig
from vqdeploy.models.var_tokenizer import SIDES, MultiScaleConfig, MultiScaleTokenizer

TOKENIZER = r"(vae_local\.)?quantize\.quant_resi\."
PRIOR = r"(var_wo_ddp\.)?(pos_1LC|blocks\.0\.attn\.mat_qkv\.weight)$"

_SAMPLING = {"top_p": 0.96, "guidance_scale": 2.5}  # 1 + the public `cfg`
_TOP_K = 900
_FIXED = {"quant_resi": 0.5, "share_quant_resi": 4, "using_znorm": False}  # of the published tokenizer
_ASSUMED = "the sides of the code maps are those for 256 pixels; a prior brings its own"


def tokenizer(source: Source) -> Part:
    """A tokenizer. Its weights do not give the sides of its code maps, and fit any.

    Raises:
        ArtifactError: A weight is missing, left over or of the wrong shape, or the configuration contradicts the
            weights.
    """
    source = _part(source, "vae_local.")
    source = replace(source, weights=_separate_projections(source.weights))
    declared = _sides(source, "v_patch_nums")
    check(source, {key: section(source.config, key).get(key) for key in _FIXED}, _FIXED)
    statistics = source.weights.get("quantize.ema_vocab_hit_SV")
    lacking = None
    if declared is None and statistics is not None and len(statistics) != len(SIDES):
        lacking = VqdeployError(
            f"the sides of the {len(statistics)} code maps cannot be read off the weights in {source.path}",
            fix="add the prior, or --tokenizer-config FILE, a YAML that gives v_patch_nums",
        )
    conv = read_conv(source, lambda name: name, None)
    config = MultiScaleConfig(conv, codebook_size=shape(source, "quantize.embedding.weight")[0])
    config = sized(config, SIDES if declared is None else declared)
    given = learned(take(source, "quantize.embedding.weight"))
    weights = fit(source, lambda: MultiScaleTokenizer(config), _name, given, r"^quantize\.ema_vocab_hit_SV$")
    return Part("var", config, weights, (_ASSUMED,) if declared is None else (), lacking=lacking)


def sized(tokenizer: MultiScaleConfig, sides: tuple[int, ...]) -> MultiScaleConfig:
    """The configuration for other code maps, and so for images of another size."""
    halvings = len(tokenizer.conv.channel_multipliers) - 1
    side = sides[-1] << halvings
    shares = [tokenizer.conv.resolution // each for each in tokenizer.conv.attention_resolutions]
    conv = replace(tokenizer.conv, resolution=side, attention_resolutions=tuple(side // share for share in shares))
    return replace(tokenizer, conv=conv, sides=sides)


def prior(sources: list[Source], tokenizer: Part) -> Part:
    """A transformer, with adaLN in each block or shared. It decides the sides of the code maps.

    Raises:
        ArtifactError: Its attention is not normalized, a weight is missing, left over or of the wrong shape, or the
            configuration contradicts the weights.
    """
    (source,) = sources
    source = _part(source, "var_wo_ddp.")
    if "blocks.0.attn.scale_mul_1H11" not in source.weights:
        raise ArtifactError(
            f"{source.path} has no scale_mul_1H11: its attention is not normalized, or it is from before April 2024",
            fix="download the file that replaced it, if there is one",
        )
    scales = take(source, "lvl_1L").flatten().tolist()
    if scales != sorted(scales):
        raise ArtifactError(f"lvl_1L of {source.path} is malformed", expected="ascending scales", found="others")
    sides = tuple(square(source, scales.count(scale)) for scale in range(int(max(scales)) + 1))
    declared = None if _ASSUMED in tokenizer.notes else tokenizer.config.sides
    check(source, {"patch_nums": _sides(source, "patch_nums")}, {"patch_nums": sides})
    check(source, {"v_patch_nums": declared}, {"v_patch_nums": sides})
    classes, width = shape(source, "class_emb.weight")
    codes, dim = tokenizer.config.codebook_size, tokenizer.config.code_dim
    layers = count(source, lambda i: f"blocks.{i}.attn.mat_qkv.weight")
    heads, shared = shape(source, "blocks.0.attn.scale_mul_1H11")[1], "shared_ada_lin.1.weight" in source.weights
    config = VARConfig(sides, codes, dim, width, layers, heads, classes - 1, shared)
    weights = fit(
        source,
        lambda: VAR(config, MultiScaleQuantizer(codes, dim, sides)),
        lambda name: name,
        ignored=r"^attn_bias_for_masking$|\.zero_k_bias$",
    )
    sampling = _SAMPLING | {"top_k": _TOP_K if codes > _TOP_K else 0}
    return Part("var", config, weights, sampling=sampling, tokenizer=sized(tokenizer.config, sides))


def _part(source: Source, prefix: str) -> Source:
    """One of the two networks of a file."""
    return submodel(source, prefix, "") if any(key.startswith(prefix) for key in source.weights) else source


def _sides(source: Source, key: str) -> tuple[int, ...] | None:
    """The sides of the code maps that a configuration gives."""
    sides = section(source.config, key).get(key)
    if sides is None:
        return None
    whole = isinstance(sides, list | tuple) and all(type(side) is int for side in sides)
    if not whole or not sides or sides[0] < 1 or list(sides) != sorted(sides):
        raise ArtifactError(f"{key} of {source.path} is malformed", expected="ascending integers", found=sides)
    return tuple(sides)


def _name(ours: str) -> str:
    return ours.replace("quantizer.convolutions.", "quantize.quant_resi.qresi_ls.")


def _separate_projections(weights: Weights) -> Weights:
    """Queries, keys and values of the attention blocks, which are one convolution there."""
    separate: Weights = {}
    for key, weight in weights.items():
        found = re.fullmatch(r"(.*\.attn(?:_1|\.\d+)\.)qkv(\..*)", key)
        if found is None or len(weight) % 3:
            separate[key] = weight
        else:
            separate |= {f"{found[1]}{name}{found[2]}": part for name, part in zip("qkv", weight.chunk(3), strict=True)}
    return separate
