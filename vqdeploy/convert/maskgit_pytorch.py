"""valeoai/Maskgit-pytorch and Halton-MaskGIT: two versions of the transformer.

The first uses the VQGAN of taming-transformers with 1024 codes, the second VQ-16 of LlamaGen, both in separate files.
"""

from vqdeploy.convert.containers import Source, Weights
from vqdeploy.convert.parts import Part, check, count, fit, need, section, shape, square, take, whole
from vqdeploy.errors import ArtifactError
from vqdeploy.models.adaptive_maskgit import AdaptiveMaskGIT
from vqdeploy.models.class_last_maskgit import ClassLastMaskGIT
from vqdeploy.models.maskgit import MaskGITConfig

PRIOR = r"first_layer\.0\.weight|reg_tokens\.weight"

_HEADS = 16  # heads of all published sizes of the first version
_HEADS_BY_WIDTH = {384: 6, 512: 6, 768: 12, 1024: 16, 1152: 16}  # of the second version


def prior(sources: list[Source], tokenizer: Part) -> Part:
    """Reads either version.

    Raises:
        VqdeployError: Neither the configuration nor the width gives the number of heads.
        ArtifactError: It does not fit the tokenizer, or a weight is missing, left over or of the wrong shape.
    """
    (source,) = sources
    return _first(source, tokenizer) if "first_layer.0.weight" in source.weights else _second(source, tokenizer)


def _heads(source: Source, usual: int | None) -> int:
    given = whole(section(source.config, "heads"), "heads")
    return need(usual if given is None else given, "heads", source, "--prior-config")


def _grid(source: Source, tokenizer: Part, positions: int) -> tuple[int, int, int]:
    side = square(source, positions)
    check(source, {"side of the map of codes": tokenizer.config.grid[0]}, {"side of the map of codes": side})
    return (side, side, 1)


def _first(source: Source, tokenizer: Part) -> Part:
    """First version: the class is the last token; vocabulary: codes, mask, classes, no label."""
    size, words, bias = tokenizer.config.codebook_size, take(source, "tok_emb.weight"), take(source, "bias")
    classes = len(words) - size - 2
    if classes < 1:
        raise ArtifactError(f"the vocabulary in {source.path} is not that of {size} codes", found=len(words))
    width, positions = words.shape[1], shape(source, "pos_emb")[1] - 1
    config = MaskGITConfig(
        _grid(source, tokenizer, positions),
        size,
        width,
        count(source, lambda i: f"transformer.layers.{i}.0.norm.weight"),
        _heads(source, _HEADS if width >= 768 else None),
        classes,
        network="class-last",
        mlp_width=shape(source, "transformer.layers.0.1.fn.net.0.weight")[0],
    )
    given: Weights = {
        "tok_emb.weight": words[: size + 1],
        "cls_emb.weight": words[size + 1 :],
        "bias": bias[:positions, :size],
    }
    for layer in range(config.layers):
        for kind in ("weight", "bias"):
            stacked = take(source, f"transformer.layers.{layer}.0.fn.mha.in_proj_{kind}")
            for name, part in zip(("query", "key", "value"), stacked.chunk(3), strict=True):
                given[f"transformer.blocks.{layer}.attn.{name}.{kind}"] = part
    return Part("movq", config, fit(source, lambda: ClassLastMaskGIT(config), _first_name, given))


def _first_name(ours: str) -> str:
    if not ours.startswith("transformer.blocks."):
        return ours
    _, _, layer, name = ours.split(".", 3)
    for own, theirs in (
        ("ln1.", "0.norm."),
        ("ln2.", "1.norm."),
        ("attn.proj.", "0.fn.mha.out_proj."),
        ("mlp.0.", "1.fn.net.0."),
        ("mlp.2.", "1.fn.net.3."),
    ):
        name = theirs + name.removeprefix(own) if name.startswith(own) else name
    return f"transformer.layers.{layer}.{name}"


def _second(source: Source, tokenizer: Part) -> Part:
    """Second version: adaptive norms; the head is tied to the embedding and may be missing from the file."""
    if "head.weight" not in source.weights:
        source.weights["head.weight"] = source.weights["tok_emb.weight"]
    rows, width = shape(source, "tok_emb.weight")
    size = tokenizer.config.codebook_size
    check(source, {"codes of the tokenizer": size}, {"codes of the tokenizer": rows - 1})
    config = MaskGITConfig(
        _grid(source, tokenizer, shape(source, "pos_emb.weight")[0]),
        size,
        width,
        count(source, lambda i: f"transformer.layers.{i}.attn.wq.weight"),
        _heads(source, _HEADS_BY_WIDTH.get(width)),
        shape(source, "cls_emb.weight")[0] - 1,
        network="adaptive",
        mlp_width=shape(source, "transformer.layers.0.ff.w1.weight")[0],
    )
    return Part("movq", config, fit(source, lambda: AdaptiveMaskGIT(config), lambda ours: ours))
