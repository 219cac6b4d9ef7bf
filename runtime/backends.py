"""The backends of plans."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

from vqdeploy.runtime.session import Backend

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""TensorRT backends -> their Python module."""


def source(backend: str) -> str:
    """Where to get the library of a TensorRT backend, for error messages."""
    return "from NVIDIA's TensorRT download" if backend == "tensorrt" else "from PyPI"


def _imported(module: str, *arguments: str) -> Backend:
    backend: Backend = import_module(module).backend(*arguments)
    return backend


BACKENDS: dict[str, Callable[[], Backend]] = {
    "onnxrt": partial(_imported, "vqdeploy.runtime.onnxrt"),
    **{name: partial(_imported, "vqdeploy.runtime.tensorrt", name) for name in LIBRARIES},
}
"""Backend name in a manifest -> factory of its `Backend`. Add a backend here; its library is imported on use."""
