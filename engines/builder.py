"""What each backend has to bring to a build: a `Builder`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime.manifest import StageInfo


@dataclass(frozen=True)
class Options:
    """What a plan is built for. A backend looks at those options that it knows.

    Attributes:
        portable: ONNX Runtime: whether to keep the package's own function bodies, to test those.
        plugin: TensorRT, one of `vqdeploy.engines.plugin.MODES`: whether our kernels run the nodes that they can. With
            `auto` they do where the libraries allow it, and a stage that fails with them is built without.
        device: ONNX Runtime: `cpu` or `cuda`.
    """

    portable: bool = False
    plugin: str = "auto"
    device: str = "cpu"


@dataclass(frozen=True)
class BuiltStage:
    """What became of a stage.

    Attributes:
        file: The graph or engine, a member of the plan.
        weights: Names of the tensors that the session takes from the package's weights.
        plugins: Names of the nodes that our kernels run.
    """

    file: Path
    weights: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """What a builder made of a package.

    Attributes:
        builder: Name and version of what built it, such as `tensorrt-rtx 1.7.1.116`.
        targets: What the plan runs on: compute capabilities, or `cuda`; empty for the CPU.
        stages: The stages, in the order that was given.
    """

    builder: str
    targets: tuple[str, ...]
    stages: list[BuiltStage]


class Builder(Protocol):
    """One backend: turns the stages of a package into the members of a plan."""

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
            stages: The stages, with the sizes of the open dimensions that the plan is to accept.
            package: Folder of their graphs and weights, which are as their digests say.
            folder: An empty folder to write to.
            options: What the plan is for.
            progress: Told the name of each stage as its build begins.

        Raises:
            VqdeployError: A library or a device is missing, or the backend cannot do what the options say.
            ArtifactError: A stage cannot be built; the message names it.
        """
        ...


def refuse_plugin(reason: str) -> VqdeployError:
    """The error when `--plugin on` cannot be had."""
    return VqdeployError(f"the plan can have no plugin: {reason}", fix="vqdeploy build --plugin off")
