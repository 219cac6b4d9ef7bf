"""Reading an ONNX package that may have been damaged or tampered with."""

import os
from pathlib import Path

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import read_json
from vqdeploy.runtime.bundle import sha256
from vqdeploy.runtime.manifest import FILE, WEIGHTS, Manifest


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a package and nothing else.

    Raises:
        VqdeployError: The folder is not a package.
        ArtifactError: The manifest is damaged or of another version.
    """
    if not (folder / FILE).exists():
        raise VqdeployError(f"{folder} is not an ONNX package", expected=f"a folder with {FILE}", fix="vqdeploy export")
    return Manifest.from_dict(read_json(folder / FILE))


def read(folder: Path) -> Manifest:
    """Reads the manifest of a package and compares the digest of every file that it lists.

    Raises:
        VqdeployError: The folder is not a package.
        ArtifactError: A file is missing, is a link, or was changed.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest.members.items():
        file = folder / name
        # A link could make the TensorRT parser read files outside the package.
        if os.path.basename(name) != name or file.is_symlink() or not file.is_file():
            raise ArtifactError(f"{file} is missing or not a plain file", fix="vqdeploy export")
        if (found := sha256(file)) != expected:
            raise ArtifactError(
                f"{file} was changed after it was exported",
                expected=f"sha256 {str(expected)[:12]}",
                found=found[:12],
                fix="vqdeploy export",
            )
    if missing := {WEIGHTS, *(stage.file for stage in manifest.stages)} - set(manifest.members):
        raise ArtifactError(f"the manifest of {folder} gives no digest for {min(missing)}", fix="vqdeploy export")
    return manifest
