"""Take a vector-quantized image generator from PyTorch to one deployable file, and run it without PyTorch."""

import logging
import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from vqdeploy.errors import show_record

if TYPE_CHECKING:
    from vqdeploy.runtime import load

__version__ = version("vqdeploy")
__all__ = ["__version__", "load"]

logging.getLogger("vqdeploy").addFilter(show_record)

# ONNX Runtime reports to its makers unless this is set before its first import, here and in processes that we start.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    """Loads the runtime only when a plan is to be opened."""
    if name == "load":
        return import_module("vqdeploy.runtime").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
