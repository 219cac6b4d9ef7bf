"""The interfaces between pipelines and backends: arrays, bindings, sessions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.manifest import Manifest, StageInfo

Subscript = int | np.integer | slice | EllipsisType
Index = Subscript | tuple[Subscript, ...]


class Array(Protocol):
    """An array in the memory of an engine, with a part of numpy's interface; a numpy array is one.

    Indexing by integers and slices gives a view. Assignment takes numbers and arrays. On a GPU assignment is enqueued,
    and `np.asarray` synchronizes.
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
    """Inputs and outputs of fixed shape. Write into `inputs`, call `run`, read from `outputs`.

    Shapes and dtypes are those of the stage in the manifest, at the sizes that were bound.
    """

    @property
    def inputs(self) -> Mapping[str, Array]:
        """Arrays by name."""

    @property
    def outputs(self) -> Mapping[str, Array]:
        """Arrays by name, without outputs that are written in place of an input."""

    def run(self) -> None:
        """One engine call; on a GPU it is enqueued.

        Raises:
            VqdeployError: The engine was not built for these sizes, or CUDA failed.
            ArtifactError: The engine failed.
        """

    def clear(self) -> None:
        """Zeroes every input, shared ones too."""


class Session(Protocol):
    """An open stage."""

    stage: StageInfo
    device: str

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """One call with fresh outputs.

        Args:
            **inputs: All inputs by name, of the shapes and dtypes of `stage.inputs`; each open dimension has one size.

        Returns:
            The outputs by name, of the shapes and dtypes of `stage.outputs`. Those that the engine writes in place of
            an input may be left out.

        Raises:
            VqdeployError: The engine was not built for these sizes, or CUDA failed.
            ArtifactError: The engine failed, or does not take the inputs.
        """

    def bind(self, dims: dict[str, int], shared: Mapping[str, Any] | None = None) -> Binding:
        """Binds buffers for these sizes of the dynamic dimensions; `shared` ones belong to other bindings too.

        Args:
            dims: Size of each open dimension of the stage, such as `batch`.
            shared: Arrays in the memory of the engine by input or output, of the shapes that `dims` gives; from
                `buffers`, for example. The others are made, and zeroed.

        Raises:
            VqdeployError: The GPU has too little memory free.
        """

    def buffers(self, dims: dict[str, int], *names: str) -> Mapping[str, Array]:
        """Zeroed buffers of the named inputs and outputs, for bindings to share.

        Args:
            dims: Size of each of their open dimensions.
            *names: Inputs and outputs of the stage; other names are ignored.

        Raises:
            VqdeployError: The GPU has too little memory free.
        """

    def array(self, values: np.ndarray) -> Array:
        """A copy of an array [...] of any dtype on the device.

        Raises:
            VqdeployError: The GPU has too little memory free.
        """


Opener = Callable[[StageInfo], Session]
"""Opens a stage of a plan; raises `ArtifactError` if it cannot be opened, `VqdeployError` if CUDA failed."""


class Backend(Protocol):
    """Runs the plans of one builder."""

    def place(self, manifest: Manifest, device: str) -> str:
        """Resolves the device of a plan, `cpu` or `cuda`, from `auto`, `cpu` or `cuda`.

        Raises:
            VqdeployError: The library or the device is not available.
            ArtifactError: The plan is for another version or another kind of GPU.
        """

    def opener(self, bundle: Bundle, device: str, threads: int, profile: Path | None) -> Opener:
        """Returns a function that opens the stages of a plan on a device, with `threads` CPU threads per engine.

        With `profile` the engine writes traces into that folder.

        Raises:
            VqdeployError: The engine cannot write traces, or CUDA failed.
        """
