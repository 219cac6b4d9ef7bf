"""The manifest of an ONNX package and of a plan: its stages, tokenizer, sampling and digests.

A plan describes itself: running it needs no knowledge of the system or module that it was made from.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Self

from vqdeploy.config import Config
from vqdeploy.errors import ArtifactError, are_class_names, can_be_shown
from vqdeploy.precision import MIXED, PRECISIONS

FORMAT = 1
"""Format version of the manifest. Other versions are rejected."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
"""What names of plans, stages and tensors are made of: they become parts of paths and commands."""

_SHA256 = re.compile(r"[0-9a-f]{64}")

_MOST_LEVELS, _LARGEST = 64, 2**31 - 1  # beyond what any graph has

FILE = "manifest.json"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class TensorInfo(Config):
    """Name, numpy dtype and shape of a graph's input or output; a dynamic dimension is given by its name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def concrete(self, dims: dict[str, int]) -> tuple[int, ...]:
        """The shape with every dynamic dimension replaced by its size."""
        return tuple(dims[d] if isinstance(d, str) else d for d in self.shape)


@dataclass(frozen=True)
class SizeRange(Config):
    """Smallest, usual and largest size of a dynamic dimension; a plan is tuned for the usual one."""

    min: int = 1
    usual: int = 1
    max: int = 64


@dataclass(frozen=True)
class StageInfo(Config):
    """One graph or engine.

    Attributes:
        name: Name of the stage.
        file: Member with the graph or engine.
        inputs: Its inputs.
        outputs: Its outputs.
        weights: Tensors of `weights.safetensors` that it reads.
        aliases: Output -> the input whose buffer it may share, for in-place updates.
        dims: Size range of each dynamic dimension.
        plugins: Nodes that our kernels run in an engine; empty in a package.
        precision: One of `vqdeploy.precision.PRECISIONS`.
    """

    name: str
    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    weights: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    dims: dict[str, SizeRange] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    precision: str = "fp32"


@dataclass(frozen=True)
class TokenizerInfo(Config):
    """Images and codes of a plan.

    Attributes:
        image: Height, width and channels of an image uint8, the input of `encode` and the output of `decode`.
        maps: Height, width and depth Q of each code map, coarse to fine. Codes are int64 [B, h, w, Q] with one map, and
            [B, N], all maps concatenated, with several; see `vqdeploy.runtime.layout`.
        codebook_size: Number of codes.
        omits_depths: Whether `decode` accepts -1 for a depth to leave out.
    """

    image: tuple[int, ...]
    maps: tuple[tuple[int, ...], ...]
    codebook_size: int
    omits_depths: bool = False


@dataclass(frozen=True)
class TextInfo(Config):
    """The texts that condition a prior: token ids int64 [length], or features of a text encoder [length, width].

    What makes ids or features of words is not in a plan.

    Attributes:
        length: Tokens of a text. All ids are attended, padding too; features may be fewer.
        vocabulary: Number of token ids; 0 for features.
        width: Features of a token; 0 for token ids.
    """

    length: int
    vocabulary: int = 0
    width: int = 0


@dataclass(frozen=True)
class SamplingInfo(Config):
    """How codes are drawn.

    Attributes:
        kind: The sampler, a key of `vqdeploy.runtime.pipeline.SAMPLERS`.
        classes: Number of labels; 1 for a prior that is unconditional, or conditioned on texts.
        no_label: The label of the unconditional branch of guidance; None if the prior has none.
        options: The sampling options of the prior with their defaults.
        text: The texts of a prior that is conditioned on them; None for labels.
    """

    kind: str
    classes: int
    no_label: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    text: TextInfo | None = None


@dataclass(frozen=True)
class Provenance(Config):
    """Where a package or plan comes from; the runtime does not use it.

    Attributes:
        producer: The exporter and its version.
        system: Name of the system; None for an own module.
        preset: Preset of the system.
        checkpoint: Digest of the checkpoint or module.
        source: Format of the public checkpoint that it was imported from.
    """

    producer: str
    system: str | None = None
    preset: str | None = None
    checkpoint: str = ""
    source: str | None = None


@dataclass(frozen=True)
class Manifest(Config):
    """The description of a package or a plan.

    Attributes:
        format: Format version, `FORMAT`.
        name: Default name of files made from it.
        precision: One of `PRECISIONS`, that of the quantized stages if the others are in fp32, or `MIXED`.
        opset: ONNX opset of the graphs.
        provenance: Where it comes from.
        stages: Its graphs or engines.
        members: The sha256 of every other file.
        tokenizer: Images and codes; None if the stages take plain arrays.
        sampling: How codes are drawn; None without a prior.
        labels: Names of the classes, in order; empty if they have none.
        config: Configuration of the system, for provenance; the runtime does not read it.
        backend: Plans only: name of the backend.
        builder: Plans only: name and version of the builder.
        targets: Plans only: compute capabilities or `cuda`; empty for the CPU.
    """

    format: int
    name: str
    precision: str
    opset: int
    provenance: Provenance
    stages: tuple[StageInfo, ...]
    members: dict[str, str]
    tokenizer: TokenizerInfo | None = None
    sampling: SamplingInfo | None = None
    labels: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    backend: str | None = None
    builder: str | None = None
    targets: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Parses a manifest: checks the format version first, then that its parts are consistent.

        Raises:
            ArtifactError: The manifest is malformed or of another version; the message names the field.
        """
        found = data.get("format") if isinstance(data, dict) else data
        if found != FORMAT:
            raise ArtifactError(
                "the manifest has an unknown format", expected=FORMAT, found=found, fix="pip install -U vqdeploy"
            )
        manifest = super().from_dict(data)
        _check_precision(manifest.precision, "precision", (*PRECISIONS, MIXED))
        _require(manifest.opset >= 1, "opset", "1 or more", manifest.opset)
        _check_names(manifest)
        _check_digests(manifest)
        _check_stages(manifest)
        if manifest.tokenizer:
            _check_tokenizer(manifest.tokenizer, manifest)
        if manifest.sampling:
            _check_sampling(manifest.sampling, manifest)
        return manifest

    def stage(self, name: str) -> StageInfo:
        """The stage of this name.

        Raises:
            ArtifactError: There is none.
        """
        if not isinstance(name, str):
            raise ArtifactError("the name of a stage is a string", expected="its name", found=type(name).__name__)
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise ArtifactError(f"{self.name} has no stage {name!r}", expected=names, found="none of that name")

    @property
    def batch(self) -> SizeRange:
        """Batch sizes that every stage accepts."""
        ranges = [stage.dims["batch"] for stage in self.stages if "batch" in stage.dims] or [SizeRange()]
        return SizeRange(max(r.min for r in ranges), min(r.usual for r in ranges), min(r.max for r in ranges))


def _require(held: bool, field: str, expected: object, found: object) -> None:
    if not held:
        raise ArtifactError(f"{field} of the manifest is wrong", expected=expected, found=found)


def _check_precision(found: str, field: str, known: Collection[str]) -> None:
    if found not in known:  # a newer version may know it
        expected, fix = " or ".join(known), "pip install -U vqdeploy"
        raise ArtifactError(f"{field} of the manifest is unknown", expected=expected, found=repr(found), fix=fix)


def _check_names(manifest: Manifest) -> None:
    origin = manifest.provenance
    texts = {"provenance.producer": origin.producer, "provenance.source": origin.source, "builder": manifest.builder}
    for where, text in texts.items():
        _require(text is None or text.isprintable(), where, "text that can be shown", repr(text))
    # Names become parts of paths and commands.
    names = {"name": manifest.name, "provenance.system": origin.system, "provenance.preset": origin.preset}
    names |= {f"stages[{i}].name": stage.name for i, stage in enumerate(manifest.stages)}
    names |= {f"targets[{i}]": target.replace(".", "") for i, target in enumerate(manifest.targets)}
    for where, name in names.items():
        _require(name is None or bool(NAME.fullmatch(name)), where, "letters, digits, - and _", repr(name))
    _require(are_class_names(manifest.labels), "labels", "distinct names of printable characters", manifest.labels)


def _check_digests(manifest: Manifest) -> None:
    digests = {f"members.{name}": digest for name, digest in manifest.members.items()}
    if manifest.provenance.checkpoint:
        digests["provenance.checkpoint"] = manifest.provenance.checkpoint
    for where, digest in digests.items():
        _require(bool(_SHA256.fullmatch(digest)), where, "a sha256 in hexadecimal", repr(digest))


def _check_stages(manifest: Manifest) -> None:
    names = [stage.name for stage in manifest.stages]
    _require(len(set(names)) == len(names), "stages", "one of each name", names)
    for stage in manifest.stages:
        _check_precision(stage.precision, f"stages.{stage.name}.precision", PRECISIONS)
        inputs, outputs = {info.name: info for info in stage.inputs}, {info.name: info for info in stage.outputs}
        for infos, named in ((stage.inputs, inputs), (stage.outputs, outputs)):
            _require(len(named) == len(infos), f"stages.{stage.name}", "one tensor of each name", len(infos))
            for info in infos:
                _check_tensor(info, f"stages.{stage.name}.{info.name}")
                unknown = [d for d in info.shape if isinstance(d, str) and d not in stage.dims]
                _require(not unknown, f"stages.{stage.name}.dims", "a size for each dynamic dimension", unknown)
        for name, sizes in stage.dims.items():
            least = 0 if name == "past" else 1  # the first of several calls has no past
            held = least <= sizes.min <= sizes.usual <= sizes.max <= _LARGEST
            _require(held, f"stages.{stage.name}.dims.{name}", f"{least} <= min <= usual <= max", sizes.to_dict())
        for output, name in stage.aliases.items():
            held = output in outputs and name in inputs and _alike(inputs[name], outputs[output])
            expected = "an output and an input of its shape and type"
            _require(held, f"stages.{stage.name}.aliases", expected, f"{output}: {name}")
        shown = all(map(can_be_shown, stage.plugins))
        _require(shown, f"stages.{stage.name}.plugins", "names that can be shown", stage.plugins)
        taken = list(stage.aliases.values())
        _require(len(set(taken)) == len(taken), f"stages.{stage.name}.aliases", "an input for each output", taken)


def _alike(one: TensorInfo, other: TensorInfo) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape)


def _check_tensor(info: TensorInfo, where: str) -> None:
    _require(can_be_shown(info.name), f"{where}.name", "a name that can be shown", info.name)
    known = ("float32", "float16", "float64", "int64", "int32", "uint8", "int8", "bool")
    _require(info.dtype in known, f"{where}.dtype", " or ".join(known), info.dtype)
    sizes = [size for size in info.shape if not isinstance(size, str)]
    held = len(info.shape) <= 32 and all(1 <= size <= _LARGEST for size in sizes)
    _require(held and math.prod(sizes) <= 2**40, f"{where}.shape", "sizes of an array", list(info.shape)[:8])


def _check_tokenizer(tokenizer: TokenizerInfo, manifest: Manifest) -> None:
    image, maps = tokenizer.image, tokenizer.maps
    _require(len(image) == 3 and all(size >= 1 for size in image), "tokenizer.image", "height, width, channels", image)
    held = 1 <= len(maps) <= _MOST_LEVELS and all(len(m) == 3 and min(m) >= 1 for m in maps)
    _require(held, "tokenizer.maps", "height, width and depth of each map", maps[:8])
    _require(len(maps) == 1 or all(m[2] == 1 for m in maps), "tokenizer.maps", "one code a position", maps)
    fits = (
        image[0] % maps[-1][0] == 0
        and image[1] % maps[-1][1] == 0
        and all(m[0] <= maps[-1][0] and m[1] <= maps[-1][1] for m in maps)
    )
    _require(fits, "tokenizer.maps", f"maps whose cells divide an image of {image[0]}x{image[1]}", maps)
    _require(1 <= tokenizer.codebook_size < 2**31, "tokenizer.codebook_size", "1 or more", tokenizer.codebook_size)
    codes = maps[0] if len(maps) == 1 else (sum(math.prod(m) for m in maps),)
    wanted = {
        "encode": (("image", "uint8", image), ("codes", "int64", codes)),
        "decode": (("codes", "int64", codes), ("image", "uint8", image)),
    }
    for name, tensors in wanted.items():
        stage = manifest.stage(name)
        for infos, (tensor, dtype, shape) in zip((stage.inputs, stage.outputs), tensors, strict=True):
            held = [(i.name, i.dtype, i.shape) for i in infos] == [(tensor, dtype, ("batch", *shape))]
            found = ", ".join(f"{i.name} {i.dtype} {list(i.shape)}" for i in infos)
            _require(held, f"stages.{name}", f"{tensor} {dtype} {['batch', *shape]}", found)


def _check_sampling(sampling: SamplingInfo, manifest: Manifest) -> None:
    _require(manifest.tokenizer is not None, "sampling", "a tokenizer", "none")
    _require(1 <= sampling.classes < 2**31, "sampling.classes", "1 or more", sampling.classes)
    _require(sampling.no_label in (None, sampling.classes), "sampling.no_label", sampling.classes, sampling.no_label)
    labels = len(manifest.labels)
    _require(labels in (0, sampling.classes), "labels", f"{sampling.classes} names, or none", labels)
    if sampling.text is not None:
        sizes, text = sampling.text.to_dict(), sampling.text
        held = all(0 <= size < 2**31 for size in sizes.values()) and text.length > 0
        held = held and (text.vocabulary > 0) != (text.width > 0)
        _require(held, "sampling.text", "a length of 1 or more, and a vocabulary or a width", sizes)
        _require(sampling.kind == "autoregressive", "sampling.text", "none for this kind of sampling", sizes)
        found = {"classes": sampling.classes, "no_label": sampling.no_label, "labels": labels}
        held = found == {"classes": 1, "no_label": 1 if text.width else None, "labels": 0}
        _require(held, "sampling.text", "no labels beside it", found)


def level_names(count: int) -> list[str]:
    """Names of the levels of a hierarchy, top first."""
    return ["top", *(f"middle{i}" for i in range(1, count - 1)), "bottom"] if count > 1 else ["top"]
