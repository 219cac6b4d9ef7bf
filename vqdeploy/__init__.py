"""Take a vector-quantized image generator from PyTorch to one deployable file, and run it without PyTorch."""

import logging
import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from vqdeploy.errors import show_record

if TYPE_CHECKING:
    from vqdeploy.runtime import load

__version__ = version("vqdeploy")
__all__ = ["__version__", "load"]

logging.getLogger("vqdeploy").addFilter(show_record)

# Disables the telemetry of ONNX Runtime; it must be set before the first import, and subprocesses inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> object:
    """Imports the runtime on first use of `load`."""
    if name == "load":
        return import_module("vqdeploy.runtime").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
