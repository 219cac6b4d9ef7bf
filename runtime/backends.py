"""The backends of plans."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

from vqdeploy.runtime.session import Backend


def _imported(module: str, *arguments: str) -> Backend:
    backend: Backend = import_module(module).backend(*arguments)
    return backend


BACKENDS: dict[str, Callable[[], Backend]] = {
    "onnxrt": partial(_imported, "vqdeploy.runtime.onnxrt"),
    "tensorrt": partial(_imported, "vqdeploy.runtime.tensorrt", "tensorrt"),
    "tensorrt-rtx": partial(_imported, "vqdeploy.runtime.tensorrt", "tensorrt-rtx"),
}
"""Backend name in a manifest -> factory of its `Backend`. Add a backend here; its library is imported on use."""
