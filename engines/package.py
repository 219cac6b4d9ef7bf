"""Reads ONNX packages, which may be damaged or tampered with."""

import os
from pathlib import Path

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import read_json
from vqdeploy.runtime import graphs
from vqdeploy.runtime.bundle import open_regular, read_weights, sha256
from vqdeploy.runtime.manifest import FILE, WEIGHTS, Manifest

_EXPORT = "vqdeploy export"


def read_manifest(folder: Path) -> Manifest:
    """Reads only the manifest of a package.

    Raises:
        VqdeployError: The folder is not a package, or cannot be read.
        ArtifactError: The manifest is damaged or of another version.
    """
    try:
        there = FILE in os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        there = False
    except (OSError, ValueError) as error:
        raise VqdeployError(f"{folder} cannot be read ({getattr(error, 'strerror', error)})") from error
    if not there:
        raise VqdeployError(f"{folder} is not an ONNX package", expected=f"a folder with {FILE}", fix=_EXPORT)
    return Manifest.from_dict(read_json(folder / FILE))


def read(folder: Path) -> Manifest:
    """Reads the manifest of a package, and checks every file that it lists: first the digest, then the content.

    Raises:
        VqdeployError: The folder is not a package, or a file cannot be read.
        ArtifactError: A file is missing, a link, or changed, or a graph is rejected, see
            `vqdeploy.runtime.graphs`.
    """
    manifest = read_manifest(folder)
    if missing := {WEIGHTS, *(stage.file for stage in manifest.stages)} - set(manifest.members):
        raise ArtifactError(f"the manifest of {folder} gives no digest for {min(missing)}", fix=_EXPORT)
    try:
        for name, expected in manifest.members.items():
            _check_file(folder, name, expected)
        weights = read_weights(folder / WEIGHTS)
        for stage in manifest.stages:
            if unknown := sorted(set(stage.weights) - set(weights)):
                raise ArtifactError(f"{folder / WEIGHTS} lacks {unknown[0]} of stage {stage.name}", fix=_EXPORT)
            _check_graph(folder / stage.file, {name: weights[name] for name in stage.weights})
    except OSError as error:
        raise VqdeployError(f"{error.filename or folder} cannot be read ({error.strerror})") from error
    return manifest


def _check_file(folder: Path, name: str, expected: str) -> None:
    file = folder / name
    # A link could make the TensorRT parser read files outside the package.
    if Path(name).name != name or file.is_symlink() or not file.is_file():
        raise ArtifactError(f"{file} is missing or not a plain file", fix=_EXPORT)
    if (found := sha256(file)) != expected:
        raise ArtifactError(
            f"{file} was changed after it was exported",
            expected=f"sha256 {expected[:12]}",
            found=found[:12],
            fix=_EXPORT,
        )


def _check_graph(file: Path, weights: graphs.Weights) -> None:
    try:
        with open_regular(file) as stream:
            graphs.check(stream.read(graphs.BYTES + 1), weights)
    except ArtifactError as error:
        raise ArtifactError(f"{file} is not a graph that can be built ({error})", fix=_EXPORT) from error
