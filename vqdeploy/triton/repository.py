"""A plan to a model repository: a model for each stage, and one that samples images.

See the model repository and the model configuration in the documentation of the server.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInput, ModelInstanceGroup, ModelOutput

from vqdeploy.errors import VqdeployError
from vqdeploy.files import check_outside, read_json, replacing_folder, write_json
from vqdeploy.options import OPTIONS
from vqdeploy.runtime.bundle import sha256
from vqdeploy.runtime.condition import Condition
from vqdeploy.runtime.layout import Layout
from vqdeploy.runtime.manifest import WEIGHTS, Manifest, StageInfo, TensorInfo
from vqdeploy.runtime.pipeline import open_plan
from vqdeploy.triton import PLAN

_TYPES = {
    "bool": "TYPE_BOOL",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8",
    "str": "TYPE_STRING",
}


def _engine(manifest: Manifest) -> dict[str, Any]:
    """An engine runs on the GPUs that it was built for."""
    names = {capability: f"model-sm{capability.replace('.', '')}.plan" for capability in manifest.targets}
    options = {"platform": "tensorrt_plan", "backend": "tensorrt", "cc_model_filenames": names}
    return options | {"default_model_filename": next(iter(names.values()), PLAN)}


_GRAPH = {"platform": "onnxruntime_onnx", "backend": "onnxruntime", "default_model_filename": "model.onnx"}
_SERVED: dict[str, Callable[[Manifest], dict[str, Any]]] = {
    "onnxrt": lambda _: _GRAPH,
    "tensorrt": _engine,
    "tensorrt-rtx": lambda _: {},
}
"""Backend of a plan -> what the configuration of a stage says of it; nothing if the server has none for stages."""

_OPTION_TYPES = {float: "float64", int: "int64", str: "str"}
_MODEL = "from vqdeploy.triton.model import TritonPythonModel\n"
_RECORD = "vqdeploy.json"  # sha256 of each file of a repository, by its path; the server reads folders alone


def write(plan: Path, folder: Path) -> list[str]:
    """Writes the model repository of a plan atomically; one is replaced if its files are as they were written.

    The model `NAME` samples images with the Python backend of the server and this package, and is there if the plan has
    a prior. The models `NAME-STAGE` are the stages, for clients that call them themselves. Engines of TensorRT-RTX have
    none: the server has no backend for them.

    Args:
        plan: The plan.
        folder: The repository.

    Returns:
        The names of the models.

    Raises:
        VqdeployError: The folder holds something else, a file that was changed, or the plan; or the server could run
            no part of the plan, or nothing is known of its backend.
        ArtifactError: The plan is damaged, or its backend or sampler does not fit.
    """
    bundle = open_plan(plan)
    manifest = bundle.manifest
    if manifest.backend not in _SERVED:
        known = " or ".join(_SERVED)
        raise VqdeployError("the server runs no plans of this backend", expected=known, found=manifest.backend)
    stages = manifest.stages if _SERVED[manifest.backend](manifest) else ()
    models = [f"{manifest.name}-{stage.name}" for stage in stages]
    models += [manifest.name] if manifest.sampling else []
    if not models:
        expected = "a plan with a prior, or for onnxrt or tensorrt"
        raise VqdeployError("the server runs no part of this plan", expected=expected, found=manifest.backend)
    check_outside(folder, [plan])
    bundle.verify()
    with replacing_folder(folder, _unchanged(folder)) as new:
        files = new / "files"
        files.mkdir()
        for name in manifest.members:
            bundle.copy(name, files / name)
        for stage in stages:
            _write_stage(new / f"{manifest.name}-{stage.name}", manifest, stage, files)
        shutil.rmtree(files)
        if manifest.sampling:
            model = _write_config(new / manifest.name, _sampling_config(manifest))
            (model / "model.py").write_text(_MODEL, encoding="utf-8")
            shutil.copyfile(plan, model / PLAN)
        written = [path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()]
        write_json(new / _RECORD, _digests(new, written))
    return models


def _unchanged(folder: Path) -> list[str]:
    """The record of a repository, and the files that are as it has them: those that may be replaced."""
    try:
        written = read_json(folder / _RECORD)
    except VqdeployError:
        return []
    if not isinstance(written, dict):
        return []
    return [_RECORD, *(path for path, digest in _digests(folder, written).items() if digest == written[path])]


def _digests(folder: Path, paths: Iterable[str]) -> dict[str, str]:
    """sha256 of those files that can be read, by their paths in a folder; one of several names is read once."""
    found: dict[str, str] = {}
    read: dict[tuple[int, int], str] = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            status = (folder / path).stat()
            identity = status.st_dev, status.st_ino
            found[path] = read[identity] = read.get(identity) or sha256(folder / path)
    return found


def _write_stage(model: Path, manifest: Manifest, stage: StageInfo, files: Path) -> None:
    """A model that is a stage: its graph or engine, and beside a graph the weights, a file that all stages share."""
    config = stage_config(manifest, stage)
    version = _write_config(model, config)
    _link(files / stage.file, version / config.default_model_filename)
    if stage.weights:
        _link(files / WEIGHTS, version / WEIGHTS)


def _write_config(model: Path, config: ModelConfig) -> Path:
    """Writes `config.pbtxt`, and returns the folder of version 1."""
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
    return model / "1"


def _link(file: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def stage_config(manifest: Manifest, stage: StageInfo) -> ModelConfig:
    """The configuration of a model that is a stage."""
    infos = (*stage.inputs, *stage.outputs)
    batched = "batch" in stage.dims and all(info.shape and info.shape[0] == "batch" for info in infos)
    return ModelConfig(
        name=f"{manifest.name}-{stage.name}",
        max_batch_size=stage.dims["batch"].max if batched else 0,
        input=[ModelInput(**_tensor(info, batched)) for info in stage.inputs],
        output=[ModelOutput(**_tensor(info, batched)) for info in stage.outputs],
        instance_group=[_instance(manifest)],
        dynamic_batching={} if batched and stage.name in ("encode", "decode") else None,
        **_SERVED[str(manifest.backend)](manifest),
    )


def _tensor(info: TensorInfo, batched: bool) -> dict[str, Any]:
    sizes = info.shape[1:] if batched else info.shape
    return {
        "name": info.name,
        "data_type": _TYPES[info.dtype],
        "dims": [-1 if isinstance(size, str) else size for size in sizes],
    }


def _instance(manifest: Manifest) -> ModelInstanceGroup:
    return ModelInstanceGroup(count=1, kind="KIND_GPU" if manifest.targets else "KIND_CPU")


def _sampling_config(manifest: Manifest) -> ModelConfig:
    """The configuration of the model that samples; its inputs are arguments of `Pipeline.generate`."""
    tokenizer, sampling = manifest.tokenizer, manifest.sampling
    if tokenizer is None or sampling is None:
        raise VqdeployError("this plan has no prior")
    condition, instance = Condition.of(sampling), _instance(manifest)
    if manifest.targets:
        instance.gpus.append(0)  # the one that the runtime takes
    inputs = [
        _input(f"{condition.name}s", "float32" if condition.features else "int64", (-1, *condition.shape)),
        _input("seed", "int64", (1,), optional=True),
    ]
    for name in sampling.options:
        size = -1 if OPTIONS[name].per_depth else 1
        inputs.append(_input(name, _OPTION_TYPES[OPTIONS[name].type], (size,), optional=True))
    outputs = {"images": ("uint8", tokenizer.image), "codes": ("int64", Layout(tokenizer.maps).shape)}
    return ModelConfig(
        name=manifest.name,
        backend="python",
        max_batch_size=0,
        input=inputs,
        output=[
            ModelOutput(name=name, data_type=_TYPES[dtype], dims=(-1, *shape))
            for name, (dtype, shape) in outputs.items()
        ],
        instance_group=[instance],
    )


def _input(name: str, dtype: str, dims: Sequence[int], optional: bool = False) -> ModelInput:
    return ModelInput(name=name, data_type=_TYPES[dtype], dims=dims, optional=optional)
