"""The manifest of an ONNX package and of a plan: what is inside, for whom it was built, and how to check it."""

import re
from dataclasses import dataclass, field
from typing import Any, Self

from vqdeploy.config import Config
from vqdeploy.errors import ArtifactError

FORMAT = 1
"""Version of the manifest. A reader refuses every other one."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")

PRECISIONS = ("fp32", "fp16")
"""Precisions of packages and plans."""

FILE = "manifest.json"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class TensorInfo(Config):
    """Name, numpy dtype and shape of a graph's input or output; an open dimension is given by its name."""

    name: str
    dtype: str
    shape: tuple[Any, ...]

    def concrete(self, dims: dict[str, int]) -> tuple[int, ...]:
        """The shape with every open dimension replaced by its size."""
        return tuple(dims[d] if isinstance(d, str) else d for d in self.shape)


@dataclass(frozen=True)
class StageInfo(Config):
    """One graph or engine.

    `aliases` pairs each output that may be written over an input with that input. `plugins` names the nodes that our
    kernels run in an engine; it is empty in a package.
    """

    name: str
    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    weights: tuple[str, ...] = ()
    aliases: dict = field(default_factory=dict)
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class BatchRange(Config):
    """Batch sizes that a plan accepts, and the one that it is tuned for."""

    min: int = 1
    opt: int = 1
    max: int = 64


@dataclass(frozen=True)
class Manifest(Config):
    """Everything that is known of a package or a plan without opening a graph.

    `config` is the checkpoint's `config.json`, `checkpoint` its digest, `members` the sha256 of every other file.
    The last three fields are set in plans only.
    """

    format: int
    system: str
    precision: str
    opset: int
    config: dict
    checkpoint: str
    stages: tuple[StageInfo, ...]
    members: dict
    producer: str
    backend: str | None = None
    builder: str | None = None
    targets: tuple[str, ...] = ()
    batch: BatchRange | None = None

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Checks the format version before anything else.

        Raises:
            ArtifactError: The manifest is malformed or of another version.
        """
        found = data.get("format") if isinstance(data, dict) else data
        if found != FORMAT:
            raise ArtifactError(
                "the manifest's format is not known here", expected=FORMAT, found=found, fix="pip install -U vqdeploy"
            )
        manifest = super().from_dict(data)
        names: list[Any] = [manifest.system, *(stage.name for stage in manifest.stages)]
        names += [manifest.config.get("model"), manifest.config.get("preset")]
        if manifest.precision not in PRECISIONS:
            raise ArtifactError(
                "the manifest's precision is not known here",
                expected=" or ".join(PRECISIONS),
                found=repr(manifest.precision),
                fix="pip install -U vqdeploy",
            )
        texts: list[Any] = [manifest.producer, manifest.checkpoint, manifest.builder or "", *manifest.targets]
        if bad := [text for text in texts if not isinstance(text, str) or not text.isprintable()]:
            raise ArtifactError("the manifest has text that cannot be shown", found=repr(bad[0]))
        # Names become parts of paths and commands.
        if bad := [name for name in names if not isinstance(name, str) or not _NAME.fullmatch(name)]:
            raise ArtifactError("the manifest has a forbidden name", expected="letters, digits, - and _", found=bad[0])
        return manifest

    def stage(self, name: str) -> StageInfo:
        """The stage of this name.

        Raises:
            ArtifactError: There is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise ArtifactError(f"this {self.system} has no stage {name!r}", expected=names, found="none of that name")
