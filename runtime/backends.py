"""The backends of plans."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

from vqdeploy.runtime.session import Backend

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backend -> Python module, of those with engines of NVIDIA's."""


def source(backend: str) -> str:
    """Where the library of a backend comes from."""
    return "from NVIDIA's TensorRT download" if backend == "tensorrt" else "from PyPI"


def _imported(module: str, *arguments: str) -> Backend:
    backend: Backend = import_module(module).backend(*arguments)
    return backend


BACKENDS: dict[str, Callable[[], Backend]] = {
    "onnxrt": partial(_imported, "vqdeploy.runtime.onnxrt"),
    **{name: partial(_imported, "vqdeploy.runtime.tensorrt", name) for name in LIBRARIES},
}
"""Backend of a manifest -> what runs its plans, whose library is imported by then. To add a backend, add it here."""
