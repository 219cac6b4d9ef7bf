"""The interface of builders, one per backend."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx

from vqdeploy.errors import ArtifactError
from vqdeploy.runtime.manifest import StageInfo


@dataclass(frozen=True)
class Options:
    """Options of a build. Each backend reads those that concern it.

    Attributes:
        portable: ONNX Runtime: whether to keep the portable function bodies of the package, to test them.
        plugin: TensorRT, one of `vqdeploy.engines.plugin.MODES`: whether our kernels run the nodes that they support.
            `auto`, also the default, uses them if the libraries allow it, and builds a stage without them if it fails
            with them.
        device: ONNX Runtime: `cpu`, also the default, or `cuda`.
    """

    portable: bool = False
    plugin: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class BuiltStage:
    """A stage that was built.

    Attributes:
        file: The graph or engine, a member of the plan.
        weights: Names of the tensors that the session reads from `weights.safetensors`.
        plugins: Names of the nodes that our kernels run.
    """

    file: Path
    weights: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """The result of a build.

    Attributes:
        builder: Name and version of the builder, such as `tensorrt-rtx 1.7.1.116`.
        targets: Where the plan runs: compute capabilities, or `cuda`; empty for the CPU.
        stages: The stages, in the given order.
        weights: The file of their weights, if it is not that of the package.
    """

    builder: str
    targets: tuple[str, ...]
    stages: list[BuiltStage]
    weights: Path | None = None


class Builder(Protocol):
    """Turns the stages of a package into members of a plan, for one backend.

    Attributes:
        choices: The values of the options `device` and `plugin` that it takes; one that is not here is refused.
    """

    @property
    def choices(self) -> Mapping[str, Collection[str]]:
        """See the class."""
        ...

    def tunes(self, stages: Sequence[StageInfo], package: Path, options: Options) -> bool:
        """Whether what is built depends on the usual batch; that of `stages` is the smallest."""
        ...

    def build(
        self,
        stages: Sequence[StageInfo],
        package: Path,
        folder: Path,
        options: Options,
        progress: Callable[[str], object],
    ) -> Built:
        """Builds every stage.

        Args:
            stages: The stages, with the sizes of the dynamic dimensions that the plan must accept.
            package: Folder of their graphs and weights, whose digests were checked.
            folder: An empty folder to write to.
            options: Options of the build.
            progress: Called with the name of each stage before its build.

        Raises:
            VqdeployError: A library or a device is missing, or the backend does not support the options.
            ArtifactError: A stage cannot be built; the message names it.
        """
        ...


def read_graph(file: Path) -> onnx.ModelProto:
    """A graph of a package, without its weights.

    Raises:
        ArtifactError: The file is not a graph.
    """
    try:
        return onnx.load(file, load_external_data=False)
    except Exception as error:  # the module of protobuf's DecodeError varies
        raise ArtifactError(f"{file} is not an ONNX graph ({error})", fix="vqdeploy export") from error
