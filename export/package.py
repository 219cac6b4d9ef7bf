"""Writes ONNX packages: a folder with one graph per stage, all weights in one file, and a manifest."""

import dataclasses
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir.passes import common
from safetensors.numpy import save_file

from vqdeploy.checkpoint import digest
from vqdeploy.errors import VqdeployError
from vqdeploy.export import tokenizer
from vqdeploy.export.functions import OPSET
from vqdeploy.export.precision import has_products, in_precision, with_int8_caches
from vqdeploy.export.rounding import observed
from vqdeploy.export.stage import Stage
from vqdeploy.files import replacing_folder, write_json
from vqdeploy.precision import PRECISIONS, Choice, together
from vqdeploy.runtime.bundle import data_offset, read_weights, sha256
from vqdeploy.runtime.manifest import (
    FILE,
    FORMAT,
    WEIGHTS,
    Manifest,
    Provenance,
    SamplingInfo,
    SizeRange,
    StageInfo,
    TensorInfo,
    TextInfo,
    TokenizerInfo,
)
from vqdeploy.systems import SYSTEMS, System

_NEWEST_OPSET = 25  # opset of the exporter
_INLINE_BYTES = 256  # smaller constants stay in the graph for shape inference

log = logging.getLogger("vqdeploy")


def export(
    system: System,
    folder: Path,
    dtype: str = "fp32",
    opset: int = OPSET,
    progress: Callable[[str], object] = log.info,
    image_size: tuple[int, int] | None = None,
) -> Manifest:
    """Atomically writes the ONNX package of a system.

    Args:
        system: A tokenizer, with a prior or without.
        folder: Output folder. An existing package is replaced.
        dtype: Precision of the stages, as for `vqdeploy.precision.Choice.parse`.
        opset: ONNX opset, 24 or 25: `TensorScatter` came with 24.
        progress: Called with the name of each stage before its export, and with steps of what comes before.
        image_size: Height and width of the images; those of the configuration when None.

    Raises:
        VqdeployError: The precision, opset or size is not supported, or the folder cannot be written.
    """
    if not OPSET <= opset <= _NEWEST_OPSET:
        raise VqdeployError("unsupported opset", expected=f"{OPSET}..{_NEWEST_OPSET}", found=opset)
    config = system.config
    side = config.tokenizer.resolution
    size = image_size or (side, side)
    if system.prior is not None and size != (side, side):
        raise VqdeployError(
            "the prior draws the codes of images of one size", expected=f"{side}x{side}", found=f"{size[0]}x{size[1]}"
        )
    provenance = Provenance(
        producer=f"vqdeploy {version('vqdeploy')}",
        system=config.model,
        preset=config.preset,
        checkpoint=digest(system),
        source=config.source,
    )
    stages = stages_of(system, dtype, size, progress)
    described = Manifest(
        format=FORMAT,
        name=config.model,
        precision=together([stage.precision for stage in stages]),
        opset=opset,
        provenance=provenance,
        stages=(),
        members={},
        tokenizer=_describe_tokenizer(system, size),
        sampling=_describe_sampling(system),
        labels=config.labels,
        config=config.to_dict(),
    )
    return write_package(stages, folder, described, progress)


def stages_of(
    system: System,
    dtype: str = "fp32",
    image_size: tuple[int, int] | None = None,
    progress: Callable[[str], object] = log.info,
) -> list[Stage]:
    """The stages of a system, the tokenizer's and those of the prior if it has one, each in its precision.

    Arguments are those of `export`.

    Raises:
        VqdeployError: A precision is unknown or does not suit its stage, or weights or activations are not finite.
    """
    choice = Choice.parse(dtype)
    _check_caches(system, choice)
    own = tokenizer.stages(system.tokenizer, image_size)
    names, of_prior, definition = [stage.name for stage in own], list[Stage](), SYSTEMS[system.config.model]
    if system.prior is not None:
        named = [precision for name, precision in choice.named.items() if name not in names]
        floats = PRECISIONS[(named or [choice.rest])[0]].floats
        if "int4" in (choice.rest, *named) and definition.kind in ("masked", "next-scale"):
            raise VqdeployError(
                f"int4 is slower than int8 for a {definition.kind} prior, whose products have many rows",
                fix="--dtype int8",
            )
        of_prior = definition.stages(system.prior, floats)
    quantizable = {stage.name: has_products(stage) for stage in of_prior}
    choice.check(names, quantizable)
    precisions = {stage.name: choice.of_tokenizer(stage.name) for stage in own}
    precisions |= {name: choice.of_prior(name, has) for name, has in quantizable.items()}
    # Nothing is known of what PixelSNAIL's layers take.
    if any(PRECISIONS[precisions[name]].bits for name in quantizable) and definition.kind != "hierarchical":
        of_prior.clear()  # their weights are copies
        with observed(system, progress):
            of_prior = definition.stages(system.prior, "fp32")
    if choice.caches:
        of_prior = [with_int8_caches(stage) if "past_key" in stage.inputs else stage for stage in of_prior]
    stages = []
    for stage in (*own, *of_prior):
        if PRECISIONS[precisions[stage.name]].bits:
            progress(f"{stage.name}, weights rounded")
        stages.append(in_precision(stage, precisions[stage.name]))
    for stage in stages:
        if stage.precision != choice.named.get(stage.name, stage.precision):
            raise VqdeployError(f"all products of stage {stage.name} need 8 bits", fix=f"--dtype {stage.name}=int8")
    return stages


def _check_caches(system: System, choice: Choice) -> None:
    """Checks that the KV caches of a system may have a precision of their own, if one is chosen."""
    autoregressive = system.prior is not None and SYSTEMS[system.config.model].kind == "autoregressive"
    if choice.caches and not (autoregressive and PRECISIONS[choice.of_prior("step", has_products=True)].bits):
        raise VqdeployError(
            "only an autoregressive prior with products in int8 or int4 has KV caches in int8",
            fix="--dtype int8,caches=int8" if autoregressive else "leave out caches=int8",
        )


def _describe_tokenizer(system: System, size: tuple[int, int]) -> TokenizerInfo:
    of = system.tokenizer
    return TokenizerInfo((*size, 3), tokenizer.maps_of(of, size), of.config.codebook_size, of.omits_depths)


def _describe_sampling(system: System) -> SamplingInfo | None:
    if system.prior is None:
        return None
    prior, options = system.config.prior, system.config.sampling.to_dict()
    kind, length, classes = SYSTEMS[system.config.model].kind, getattr(prior, "condition_length", 1), prior.classes
    if width := getattr(prior, "text_width", 0):
        return SamplingInfo(kind, classes, classes, options, TextInfo(length, width=width))
    if length > 1:
        return SamplingInfo(kind, 1, None, options, TextInfo(length, vocabulary=classes))
    if not getattr(prior, "null_label", True):
        options.pop("guidance_scale", None)
    return SamplingInfo(kind, classes, classes if "guidance_scale" in options else None, options)


def write_package(
    stages: Sequence[Stage], folder: Path, described: Manifest, progress: Callable[[str], object] = log.info
) -> Manifest:
    """Atomically writes the graphs of stages, their weights and a manifest.

    Args:
        stages: The stages to export.
        folder: Output folder. An existing package is replaced.
        described: The manifest without `stages` and `members`.
        progress: Called with the name of each stage before its export.
    """
    with replacing_folder(folder, (FILE, WEIGHTS, "*.onnx")) as new:
        graphs: dict[str, tuple[Stage, onnx_ir.Model]] = {}
        for stage in stages:
            progress(stage.name)
            model = _export_stage(stage, described.opset)
            graphs[stage.name] = stage, model
        weights = _share_weights({name: model for name, (_, model) in graphs.items()})
        save_file(weights, new / WEIGHTS)
        _point_to_file((model for _, model in graphs.values()), new / WEIGHTS)
        infos = []
        for stage, model in graphs.values():
            common.ClearMetadataAndDocStringPass()(model)  # the exporter leaves stack traces
            origin = described.provenance
            notes = {"producer": origin.producer, "system": described.name, "checkpoint": origin.checkpoint}
            model.metadata_props.update(notes | {"stage": stage.name, "precision": stage.precision})
            onnx_ir.save(model, new / f"{stage.name}.onnx")
            infos.append(_describe(stage, model))
        members = {file.name: sha256(file) for file in sorted(new.iterdir())}
        manifest = dataclasses.replace(described, stages=tuple(infos), members=members)
        write_json(new / FILE, manifest.to_dict())
    return manifest


def _export_stage(stage: Stage, opset: int) -> onnx_ir.Model:
    # The exporter warns of its own deprecated calls, and that torchvision is missing.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stage.to_onnx(opset)


def _share_weights(graphs: dict[str, onnx_ir.Model]) -> dict[str, np.ndarray]:
    """Deduplicates initializers over all graphs: equal tensors get one name; returns each once."""
    names: dict[str, str] = {}  # digest -> name
    taken = {out.name for model in graphs.values() for node in model.graph for out in node.outputs}
    weights: dict[str, np.ndarray] = {}
    for stage, model in graphs.items():
        for value in _initializers(model):
            array = value.const_value.numpy()
            if not array.flags.c_contiguous:  # the exporter leaves transposed views, whose bytes are not contiguous
                value.const_value = onnx_ir.tensor(np.ascontiguousarray(array), name=value.name)
        common.DeduplicateHashedInitializersPass(size_limit=2**40)(model)
        for value in _large(model):
            array = value.const_value.numpy()
            key = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
            if key not in names:
                names[key] = value.name if value.name not in {*weights, *taken} else f"{stage}.{value.name}"
                weights[names[key]] = np.ascontiguousarray(array)
            value.name = names[key]
    return weights


def _initializers(model: onnx_ir.Model) -> list[Any]:
    return list(model.graph.initializers.values())  # by their type, all fields may be None


def _large(model: onnx_ir.Model) -> list[Any]:
    return [value for value in _initializers(model) if value.const_value.nbytes >= _INLINE_BYTES]


def _point_to_file(models: Iterable[onnx_ir.Model], file: Path) -> None:
    """Points the initializers of the graphs at the safetensors file, as ONNX external data."""
    weights, data = read_weights(file), data_offset(file)
    for model in models:
        for value in _large(model):
            start, stop = weights[value.name].start, weights[value.name].stop
            dtype, shape = value.const_value.dtype, value.const_value.shape
            value.const_value = onnx_ir.ExternalTensor(
                file.name, data + start, stop - start, dtype, shape=shape, name=value.name, base_dir=file.parent
            )


def _describe(stage: Stage, model: onnx_ir.Model) -> StageInfo:
    return StageInfo(
        stage.name,
        f"{stage.name}.onnx",
        tuple(map(_tensor, model.graph.inputs)),
        tuple(map(_tensor, model.graph.outputs)),
        tuple(value.name for value in _large(model)),
        stage.aliases,
        {d.name: SizeRange(d.smallest, d.usual, d.largest) for d in sorted(stage.dimensions, key=lambda d: d.name)},
        precision=stage.precision,
    )


def _tensor(value: onnx_ir.Value) -> TensorInfo:
    if value.name is None or value.dtype is None or value.shape is None:
        raise ValueError(f"{value} has no name, type or shape")
    return TensorInfo(value.name, str(value.dtype.numpy()), tuple(_size(d) for d in value.shape))


def _size(dim: int | onnx_ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else str(dim.value)
