"""Builds plans for ONNX Runtime: the graphs with bodies of its own operators, and the weights as they are."""

from pathlib import Path

import onnx

from vqdeploy.engines.bodies_onnxrt import swap_in
from vqdeploy.errors import ArtifactError
from vqdeploy.runtime.manifest import StageInfo


def build_stage(stage: StageInfo, package: Path, folder: Path, portable: bool = False) -> Path:
    """Writes the graph of a stage into `folder`, which refers to the weights by name.

    With `portable` the functions keep the bodies of the package.
    """
    try:
        model = onnx.load(package / stage.file, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no stable home
        raise ArtifactError(f"{package / stage.file} is not an ONNX graph ({error})", fix="vqdeploy export") from error
    caches = [info for info in stage.inputs if info.name in stage.aliases.values()]
    if not portable:
        swap_in(model, heads=caches[0].shape[1] if caches else 0)
    target = folder / stage.file
    onnx.save(model, target)
    return target
