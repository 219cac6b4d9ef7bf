"""What pipelines and samplers ask of a backend: arrays, bindings, sessions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.manifest import Manifest, StageInfo

Place = int | np.integer | slice | EllipsisType
Index = Place | tuple[Place, ...]


class Array(Protocol):
    """An array where an engine reads and writes, with some of numpy's ways: a numpy array is one.

    Indexing by whole numbers and slices gives a view. Assignment takes numbers and arrays. On a GPU it is queued, and
    `np.asarray` waits.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """As numpy's."""

    @property
    def dtype(self) -> np.dtype:
        """As numpy's."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Index, /) -> "Array": ...

    def __setitem__(self, index: Index, value: ArrayLike, /) -> None: ...

    def __array__(self) -> np.ndarray: ...


class Binding(Protocol):
    """Inputs and outputs of fixed shape. Write into `inputs`, call `run`, read from `outputs`."""

    @property
    def inputs(self) -> Mapping[str, Array]:
        """Arrays by name."""

    @property
    def outputs(self) -> Mapping[str, Array]:
        """Arrays by name, without those that are written over an input."""

    def run(self) -> None:
        """One engine call."""

    def clear(self) -> None:
        """Zeros into every input, shared ones too."""


class Session(Protocol):
    """One stage, ready to run."""

    stage: StageInfo
    device: str

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """One call with fresh outputs."""

    def bind(self, dims: dict[str, int], shared: Mapping[str, Any] | None = None) -> Binding:
        """Buffers for these sizes of the open dimensions, some of them shared with other bindings."""

    def buffers(self, dims: dict[str, int], *names: str) -> Mapping[str, Array]:
        """Empty buffers of inputs and outputs, for bindings to share."""

    def array(self, values: np.ndarray) -> Array:
        """A copy of an array where the buffers lie."""


Opener = Callable[[StageInfo], Session]
"""Opens a stage of a plan."""


class Backend(Protocol):
    """Runs the plans of one builder."""

    def place(self, manifest: Manifest, device: str) -> str:
        """Where a plan runs, `cpu` or `cuda`, for a wish of `auto`, `cpu` or `cuda`.

        Raises:
            VqdeployError: The library or the device is not there.
            ArtifactError: The plan is for another version or another kind of GPU.
        """

    def opener(self, bundle: Bundle, device: str, threads: int, profile: Path | None) -> Opener:
        """Opens the stages of a plan on a device, with a number of threads for each engine.

        With `profile` the engine writes traces into that folder, where it can.
        """
